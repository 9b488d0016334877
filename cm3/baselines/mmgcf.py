"""MMGCF: LightGCN, and one linear projection per modality that is fused into its items."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class MMGCF(NetworkBaseline, FilledFeatures):
    """LightGCN whose items are fused with one linear projection per modality after the graph (late fusion)."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True

    name: Literal["mmgcf"] = "mmgcf"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    fusion: Literal["mean", "sum", "concat"] = Field(
        "mean", description="how vectors are fused: their mean, their sum, or a linear map of their concatenation"
    )
    weighting: Literal["equal", "alpha", "normalized"] = Field(
        "normalized",
        description="equal: the modalities are fused first, then the result with the ID embedding; alpha: all at once, with "
        "a trained weight a for the ID embedding and 1 - a for each modality; normalized: all at once as unit vectors, the "
        "ID embedding times the number of modalities",
    )
    dropout: Float = Field(0.5, ge=0, lt=1, description="fraction of the user-item edges that are pruned in an epoch")
    reg_weight: Float = Field(1e-3, ge=0, description="weight of the L2 penalty on a batch's initial embeddings")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.mmgcf`."""
        from cm3.baselines.networks.mmgcf import network

        return network(inputs, self)
