"""LIRDRec: items represented by their features alone, with learnt weights of the modalities per user."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cm3.baselines.base import FilledFeatures, NetworkBaseline, PropagatedGraphs
from cm3.common.strict import Float
from cm3.model_spec import Weighted

if TYPE_CHECKING:
    from cm3.baselines.inputs import Inputs
    from cm3.model.network import Network


class LIRDRec(NetworkBaseline, FilledFeatures, PropagatedGraphs, Weighted):
    """Items represented by their features alone, with a shared representation from their cosine transforms."""

    version: ClassVar[int | None] = 1
    reads_features: ClassVar[bool] = True
    reads_item_graphs: ClassVar[bool] = True
    training_defaults: ClassVar[Mapping[str, Any]] = {**NetworkBaseline.training_defaults, "lr": 1e-4}

    name: Literal["lirdrec"] = "lirdrec"
    embedding_dim: int = Field(64, gt=0, description="width d of each modality's and of the shared representation")
    n_ui_layers: int = Field(2, ge=0, description="layers over the user-item graph")
    copy_start: Float = Field(
        0.9, gt=0, lt=1, description="initial weight of a user's computed modality weights against the copied ones"
    )
    copy_decay: Float = Field(
        0.9, gt=0, le=1, description="base of the decay of that weight: in epoch t it shrinks by copy_decay^t"
    )
    reg_weight: Float = Field(1e-3, ge=0, description="weight of the mean square of all final embeddings")

    def network(self, inputs: "Inputs") -> "Network":
        """See `cm3.baselines.networks.lirdrec`."""
        from cm3.baselines.networks.lirdrec import network

        return network(inputs, self)
