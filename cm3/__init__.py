"""CM3 (calibrated multimodal recommendation): similarity graph, model, training and evaluation.

Names are resolved on first use, so that importing `cm3` or `cm3.config` never imports torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CM3": "cm3.model",
    "Recommender": "cm3.library",
    "alignment": "cm3.losses",
    "calibrated_uniformity": "cm3.losses",
    "fit": "cm3.library",
    "knn": "cm3.neighbours",
    "load": "cm3.library",
    "per_user": "cm3.metrics",
    "recommend": "cm3.library",
    "similar_items": "cm3.library",
    "slerp": "cm3.fusion",
    "spherical_bezier": "cm3.fusion",
    "uniformity": "cm3.losses",
}
_MODULES = frozenset({"config", "evaluate", "fusion", "graph", "losses", "metrics", "model", "similarity", "train"})

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"cm3.{name}")
    raise AttributeError(f"module 'cm3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
