"""DirectAU: alignment and uniformity as the loss."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import NetworkBaseline
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class DirectAU(NetworkBaseline):
    """Alignment and uniformity of user and item embeddings as the loss."""

    version: ClassVar[int | None] = 1

    name: Literal["directau"] = "directau"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_layers: int = Field(0, ge=0, description="layers over the user-item graph; 0: matrix factorisation")
    gamma: Float = Field(1.0, ge=0, description="weight of the uniformity losses")
    dedup_pairs: bool = Field(False, description="exclude pairs of the same user or item from the uniformity losses")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.directau`."""
        from cm3.baselines.networks.directau import network

        return network(inputs, self)
