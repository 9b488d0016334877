"""CEASE: EASE with the items' features, in closed form."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.ease import LinearAutoencoder
from cm3.common.strict import Float
from cm3.model_spec import MEGABYTE, Estimate, Sizes, Weighted

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights


class CEASE(LinearAutoencoder, Weighted):
    """Linear autoencoder of interactions and features, without self-similarity, in closed form."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True

    name: Literal["cease"] = "cease"
    l2: Float = Field(300.0, gt=0, description="lambda: penalty on the squared weights")
    content_weight: Float = Field(
        0.5,
        ge=0,
        description="weight of the features' cosines next to co-occurrence; at 1 both have the same trace, at 0 this is ease",
    )

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Add the features in float32 and float64 to the estimate of EASE."""
        base = super().training_estimate(sizes, epochs=epochs, batch_size=batch_size)
        return Estimate(base.memory_mb + sum(rows * dim for rows, dim in sizes.features) * 12 / MEGABYTE, base.minutes)

    def solve(self, inputs: "Inputs", device: "torch.device") -> "ItemWeights":
        """See `cm3.baselines.closed_forms.cease`."""
        from cm3.baselines.closed_forms.cease import solve

        return solve(inputs, self, device)
