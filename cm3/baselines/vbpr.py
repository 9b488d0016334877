"""VBPR: BPR with projected features."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class VBPR(NetworkBaseline, FilledFeatures):
    """BPR on item embeddings extended by a projection of the features."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True

    name: Literal["vbpr"] = "vbpr"
    embedding_dim: int = Field(64, gt=0, description="width d of the ID embeddings, and of the projected features")
    reg_weight: Float = Field(
        0.01, ge=0, description="weight of the L2 penalty on a batch's whole user and item vectors"
    )

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.vbpr`."""
        from cm3.baselines.networks.vbpr import network

        return network(inputs, self)
