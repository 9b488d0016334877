"""ItemKNN: nearest items by co-occurrence."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import ClosedForm
from cm3.common.strict import Float

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights


class ItemKNN(ClosedForm):
    """Sum of the cosines of co-occurrence between an item and those of its nearest items that the user has."""

    version: ClassVar[int | None] = 1
    on_device: ClassVar[bool] = False
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    name: Literal["itemknn"] = "itemknn"
    k: int = Field(100, gt=0, description="nearest items that contribute to the score of an item, itself excluded")
    shrink: Float = Field(
        10.0, ge=0, description="shrinkage: added to the denominator of the cosine, so that few common users count less"
    )

    def solve(self, inputs: "Inputs", device: "torch.device") -> "ItemWeights":
        """See `cm3.baselines.closed_forms.itemknn`."""
        from cm3.baselines.closed_forms.itemknn import solve

        return solve(inputs, self, device)
