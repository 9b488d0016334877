"""Base classes of the baselines' specs: networks and closed forms, and the settings that several of them share."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Strict
from cm3.model_registry import parse_model
from cm3.model_spec import ItemGraphs, ModelSpec

if TYPE_CHECKING:
    import torch

    from cm3.baselines.inputs import Inputs
    from cm3.evaluation.item_weights import ItemWeights
    from cm3.model.network import Embeddings, Network

__all__ = ["Baseline", "ClosedForm", "FilledFeatures", "NetworkBaseline", "PropagatedGraphs", "parse_baseline"]


class Baseline(ModelSpec):
    """Settings of a model that the stage `cm3.baselines.train` trains."""

    stage: ClassVar[str] = "train-baseline"


class NetworkBaseline(Baseline):
    """A network, trained by the loop that trains CM3.

    The default patience is that of the MMRec toolbox. Losses over pairs of items first undo what the graph's smoothing
    alone achieves and then improve slowly: on the fashion data of benchmarks/RESULTS.md, LightGCN stops at its first
    epoch with a patience of 5, and too early with CM3's 10.
    """

    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "torch")
    training_defaults: ClassVar[Mapping[str, Any]] = {"patience": 20}

    @abstractmethod
    def network(self, inputs: "Inputs") -> "Network":
        """Return the model; its initial values come from torch's global generator."""


class ClosedForm(Baseline):
    """A model that is computed without gradient descent."""

    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "torch")
    trains: ClassVar[bool] = False

    @abstractmethod
    def solve(self, inputs: "Inputs", device: "torch.device") -> "Embeddings | ItemWeights":
        """Return embeddings or item weights, as `exports` says."""


class FilledFeatures(Strict):
    """Settings of a model that replaces missing vectors."""

    missing: Literal["mean", "zero"] = Field(
        "mean", description="vector of an item without one: the mean of the other vectors, or zero"
    )


class PropagatedGraphs(ItemGraphs):
    """Settings of a model that propagates over the item-item graph."""

    n_mm_layers: int = Field(1, ge=0, description="layers over the item-item graph")


def parse_baseline(data: Mapping[str, Any], where: str = "model") -> Baseline:
    """Return validated settings of the baseline that `data["name"]` names; `where` is the key path of the section.

    Raises:
        UserError: no name, an unknown one or that of another kind of model, an unknown key, or an impossible value.
    """
    model = parse_model(data, where)
    if "name" not in data or not isinstance(model, Baseline):
        raise UserError(f"{where}.name = {data.get('name')!r}: not a baseline")
    return model
