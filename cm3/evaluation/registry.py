"""Registry of metrics: name -> "module:Class". Adding a metric adds one line. Imports no NumPy.

The order of the lines is that of the columns in per_user.parquet and of the keys in evaluation.json.
"""

from abc import abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from cm3.common.parts import Part

if TYPE_CHECKING:
    import numpy as np

METRICS = {
    "recall": "cm3.evaluation.metrics:Recall",
    "ndcg": "cm3.evaluation.metrics:NDCG",
    "precision": "cm3.evaluation.metrics:Precision",
    "map": "cm3.evaluation.metrics:MAP",
    "hitrate": "cm3.evaluation.metrics:HitRate",
    "mrr": "cm3.evaluation.metrics:MRR",
}


class Metric(Part):
    """A metric of one user's list at a cut-off.

    Attributes:
        name: as in the registry, in columns such as "recall@20" and in the config.
        title: as papers write it.
        formula: what docs/metrics.md has: per user, with hit_j = 1 where the item at rank j is one of the n relevant ones.
        larger_is_better: False for an error or a distance.
        additive: the value of a list is the sum of the values of lists with one of its hits each. Such a metric can be
            computed on a GPU during training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    larger_is_better: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def values(hits: "np.ndarray", n_truth: "np.ndarray", k: int) -> "np.ndarray":
        """Return the metric at cut-off k, (U,) float64; 0 for a user without relevant items.

        Args:
            hits: (U, K) bool, whether the item at each rank is relevant.
            n_truth: (U,) numbers of relevant items.
            k: cut-off.
        """


def metric_class(name: str) -> type[Metric]:
    """Return the class of a metric; "recall@20" is the metric "recall" at the cut-off 20.

    Raises:
        KeyError: no metric of this name.
    """
    module, _, attribute = METRICS[name.partition("@")[0]].partition(":")
    found: type[Metric] = getattr(import_module(module), attribute)
    return found


def larger_is_better(name: str) -> bool:
    """Return whether larger values of a metric, such as "recall@20", are better; they are for a name not in the registry."""
    return name.partition("@")[0] not in METRICS or metric_class(name).larger_is_better
