"""SMORE: features filtered and fused in the frequency domain, one view per modality and one of their fusion."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline, PropagatedGraphs
from cm3.common.strict import Float

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class SMORE(NetworkBaseline, FilledFeatures, PropagatedGraphs):
    """Features filtered and fused in the frequency domain, one view per modality and one of their fusion."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    reads_item_graphs: ClassVar[bool] = True

    name: Literal["smore"] = "smore"
    embedding_dim: int = Field(64, gt=0, description="width d of the embeddings")
    n_ui_layers: int = Field(3, ge=0, description="layers over the user-item graph")
    dropout: Float = Field(0.1, ge=0, lt=1, description="dropout rate of the gates that weigh the views")
    cl_weight: Float = Field(0.01, ge=0, description="weight of the contrastive loss between behaviour and content")
    temperature: Float = Field(0.2, gt=0, description="temperature of the contrastive loss")
    reg_weight: Float = Field(1e-4, ge=0, description="weight of the L2 penalty on a batch's embeddings")
    train_features: bool = Field(False, description="train the features as parameters, as in the MMRec toolbox")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.smore`."""
        from cm3.baselines.networks.smore import network

        return network(inputs, self)
