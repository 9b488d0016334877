"""MM-GF: a graph filter over co-occurrence and content, in closed form."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import ClosedForm
from cm3.common.strict import Float
from cm3.model_spec import MEGABYTE, Estimate, Sizes, Weight, Weighted

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights


class MMGF(ClosedForm, Weighted):
    """Linear graph filter over the items' co-occurrence and the similarities of their features, in closed form."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"
    image_share: ClassVar[float] = 1 / 6000

    name: Literal["mm-gf"] = "mm-gf"
    alpha: Float = Field(
        0.89, ge=0, le=1, description="exponent of the normalisation: rows by sum^-alpha, columns by sum^(alpha - 1)"
    )
    power: Float = Field(0.67, gt=0, description="exponent s of each entry of an item-item graph")
    content_weight: Float | None = Field(
        None,
        ge=0,
        description="weight of all item graphs of features against that of interactions; null: 600, or 0.1 with image alone",
    )
    modality_weights: dict[str, Weight] | None = Field(
        None,
        description="weight of each modality's item graph, scaled to sum 1; null: 1/6000 for image and equal shares of the "
        "rest for the others; equal shares without image or with image alone",
    )
    max_items: int = Field(
        25_000, gt=0, description="maximum number of items; memory grows with its square, and more are an error"
    )

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Add two float32 matrices of items by items, the features in float64, and the products' time."""
        base = super().training_estimate(sizes, epochs=epochs, batch_size=batch_size)
        width = sum(dim for _, dim in sizes.features)
        memory = base.memory_mb + (2 * sizes.items**2 * 4 + 4 * sizes.items * width * 8) / MEGABYTE
        return Estimate(memory, base.minutes + sizes.items**2 * (width + 100) / 5e9 / 60)

    def exported_mb(self, sizes: Sizes) -> float:
        """Return the size in MB of the dense float32 weights."""
        return sizes.items**2 * 4 / MEGABYTE

    def solve(self, inputs: "Inputs", device: "torch.device") -> "ItemWeights":
        """See `cm3.baselines.closed_forms.mm_gf`."""
        from cm3.baselines.closed_forms.mm_gf import solve

        return solve(inputs, self, device)
