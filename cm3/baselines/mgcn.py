"""MGCN: purified features, one view per modality, fusion by attention."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline, PropagatedGraphs
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class MGCN(NetworkBaseline, FilledFeatures, PropagatedGraphs):
    """Features purified by behaviour, one view of users and items per modality, and fusion by attention."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    reads_item_graphs: ClassVar[bool] = True

    name: Literal["mgcn"] = "mgcn"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    cl_weight: Float = Field(0.01, ge=0, description="weight of the contrastive loss between behaviour and content")
    temperature: Float = Field(0.2, gt=0, description="temperature of the contrastive loss")
    reg_weight: Float = Field(1e-4, ge=0, description="weight of the L2 penalty on a batch's embeddings")
    train_features: bool = Field(False, description="train the features as parameters, as in the MMRec toolbox")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.mgcn`."""
        from cm3.baselines.networks.mgcn import network

        return network(inputs, self)
