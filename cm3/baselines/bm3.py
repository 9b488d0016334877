"""BM3: bootstrapped agreement of users, items and modalities."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class BM3(NetworkBaseline, FilledFeatures):
    """Bootstrapped agreement of users, items and modalities, without negative samples."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True

    name: Literal["bm3"] = "bm3"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(1, ge=0, description="layers over the user-item graph")
    dropout: Float = Field(0.5, ge=0, lt=1, description="dropout rate of the target embeddings")
    cl_weight: Float = Field(2.0, ge=0, description="weight of the losses between and within modalities")
    reg_weight: Float = Field(0.1, ge=0, description="weight of the penalty on the norms of all embeddings")
    train_features: bool = Field(False, description="train the features as parameters, as in the MMRec toolbox")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.bm3`."""
        from cm3.baselines.networks.bm3 import network

        return network(inputs, self)
