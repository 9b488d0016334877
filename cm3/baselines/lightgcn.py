"""LightGCN: embeddings averaged over the layers of the user-item graph."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class LightGCN(NetworkBaseline):
    """Embeddings averaged over the layers of the user-item graph, with the BPR loss."""

    version: ClassVar[int | None] = 1

    name: Literal["lightgcn"] = "lightgcn"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(3, ge=0, description="layers over the user-item graph")
    reg_weight: Float = Field(1e-4, ge=0, description="weight of the L2 penalty on a batch's initial embeddings")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.lightgcn`."""
        from cm3.baselines.networks.lightgcn import network

        return network(inputs, self)
