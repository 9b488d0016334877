"""BPR-MF: matrix factorisation with the BPR loss."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class BPRMF(NetworkBaseline):
    """Matrix factorisation trained by Bayesian personalised ranking."""

    version: ClassVar[int | None] = 1

    name: Literal["bpr-mf"] = "bpr-mf"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    reg_weight: Float = Field(0.01, ge=0, description="weight of the L2 penalty on a batch's embeddings")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.bpr_mf`."""
        from cm3.baselines.networks.bpr_mf import network

        return network(inputs, self)
