"""ItemKNN on content: nearest items by features."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import ClosedForm
from cm3.model_spec import Weighted

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights


class ItemKNNContent(ClosedForm, Weighted):
    """ItemKNN with cosines of features, weighted over the modalities."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    exports: ClassVar[Literal["embeddings", "item_weights"]] = "item_weights"

    name: Literal["itemknn-content"] = "itemknn-content"
    k: int = Field(10, gt=0, description="nearest items that contribute to the score of an item, itself excluded")

    def solve(self, inputs: "Inputs", device: "torch.device") -> "ItemWeights":
        """See `cm3.baselines.closed_forms.itemknn_content`."""
        from cm3.baselines.closed_forms.itemknn_content import solve

        return solve(inputs, self, device)
