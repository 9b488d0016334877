"""FREEDOM: a frozen item-item graph and a pruned user-item graph."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline, PropagatedGraphs
from cm3.common.strict import Float
from cm3.model_spec import Weighted

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class FREEDOM(NetworkBaseline, FilledFeatures, PropagatedGraphs, Weighted):
    """A frozen item-item graph, and a user-item graph whose edges are pruned anew in each epoch."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    reads_item_graphs: ClassVar[bool] = True

    name: Literal["freedom"] = "freedom"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    dropout: Float = Field(0.8, ge=0, lt=1, description="fraction of the user-item edges that are pruned in an epoch")
    reg_weight: Float = Field(1e-3, ge=0, description="weight of the modalities' own ranking losses")
    train_features: bool = Field(False, description="train the features as parameters, as in the MMRec toolbox")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.freedom`."""
        from cm3.baselines.networks.freedom import network

        return network(inputs, self)
