"""EASE: item-item regression without self-similarity, in closed form."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import ClosedForm
from cm3.common.strict import Float
from cm3.model_spec import MEGABYTE, Estimate, Sizes

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights


class LinearAutoencoder(ClosedForm):
    """Settings of a ridge regression of each item on all others, which inverts one matrix of items by items."""

    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    l2: Float = Field(100.0, gt=0, description="lambda: penalty on the squared weights")
    max_items: int = Field(
        25_000, gt=0, description="maximum number of items; memory grows with its square, and more are an error"
    )

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Add a float64 and a float32 matrix of items by items and their rows in the file, and time cubic in the items."""
        base = super().training_estimate(sizes, epochs=epochs, batch_size=batch_size)
        memory = base.memory_mb + sizes.items**2 * 16 / MEGABYTE
        return Estimate(memory, base.minutes + sizes.items**3 / 1e11 / 60)

    def exported_mb(self, sizes: Sizes) -> float:
        """Return the size in MB of the dense float32 weights."""
        return sizes.items**2 * 4 / MEGABYTE


class EASE(LinearAutoencoder):
    """Linear autoencoder without self-similarity, in closed form."""

    version: ClassVar[int | None] = 1

    name: Literal["ease"] = "ease"

    def solve(self, inputs: "Inputs", device: "torch.device") -> "ItemWeights":
        """See `cm3.baselines.closed_forms.ease`."""
        from cm3.baselines.closed_forms.ease import solve

        return solve(inputs, self, device)
