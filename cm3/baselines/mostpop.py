"""MostPop: the items with the most training interactions, for every user."""

from typing import TYPE_CHECKING, ClassVar, Literal

from cm3.baselines.base import ClosedForm

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Embeddings


class MostPop(ClosedForm):
    """The items with the most training interactions, the same for every user."""

    version: ClassVar[int | None] = 1
    on_device: ClassVar[bool] = False

    name: Literal["mostpop"] = "mostpop"

    def solve(self, inputs: "Inputs", device: "torch.device") -> "Embeddings":
        """See `cm3.baselines.closed_forms.mostpop`."""
        from cm3.baselines.closed_forms.mostpop import solve

        return solve(inputs, self, device)
