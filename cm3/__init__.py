"""CM3 (calibrated multimodal recommendation): similarity graph, model, training and evaluation.

Names are resolved on first use: importing `cm3` or `cm3.config` does not import torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CM3": "cm3.model.model",
    "Recommender": "cm3.library.recommender",
    "add_items": "cm3.library.new_items",
    "alignment": "cm3.model.losses",
    "calibrated_uniformity": "cm3.model.losses",
    "embed_items": "cm3.library.new_items",
    "evaluate": "cm3.library.recommending",
    "fit": "cm3.library.fitting",
    "knn": "cm3.similarity.exact",
    "load": "cm3.library.recommender",
    "per_user": "cm3.evaluation.metrics",
    "recommend": "cm3.library.recommending",
    "recommend_for": "cm3.library.recommending",
    "similar_items": "cm3.library.recommending",
    "slerp": "cm3.model.fusion",
    "spherical_bezier": "cm3.model.fusion",
    "uniformity": "cm3.model.losses",
}
_MODULES = {
    "config": "cm3.config",
    "fusion": "cm3.model.fusion",
    "graph": "cm3.model.graph",
    "losses": "cm3.model.losses",
    "metrics": "cm3.evaluation.metrics",
    "train": "cm3.training.train",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'cm3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
