"""Registry of models: name in the config -> "module:Class" of the spec. Adding a model adds one line.

Models of other packages are entry points of the group `cm3.models`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from cm3.common.entry_points import with_entry_points
from cm3.common.errors import UserError
from cm3.common.strict import nearest, validate
from cm3.model_spec import ModelSpec

MODELS = {
    "cm3": "cm3.config:Model",
    "mostpop": "cm3.baselines.mostpop:MostPop",
    "itemknn": "cm3.baselines.itemknn:ItemKNN",
    "itemknn-content": "cm3.baselines.itemknn_content:ItemKNNContent",
    "ease": "cm3.baselines.ease:EASE",
    "cease": "cm3.baselines.cease:CEASE",
    "bpr-mf": "cm3.baselines.bpr_mf:BPRMF",
    "lightgcn": "cm3.baselines.lightgcn:LightGCN",
    "directau": "cm3.baselines.directau:DirectAU",
    "vbpr": "cm3.baselines.vbpr:VBPR",
    "bm3": "cm3.baselines.bm3:BM3",
    "freedom": "cm3.baselines.freedom:FREEDOM",
    "mgcn": "cm3.baselines.mgcn:MGCN",
    "mmgcf": "cm3.baselines.mmgcf:MMGCF",
    "mm-gf": "cm3.baselines.mm_gf:MMGF",
    "lirdrec": "cm3.baselines.lirdrec:LIRDRec",
    "smore": "cm3.baselines.smore:SMORE",
    "external": "cm3.evaluation.external_config:External",
    "rerank": "cm3.evaluation.rerank_config:Rerank",
}

DEFAULT_MODEL = "cm3"
"""Model of an experiment that names none."""


def models() -> dict[str, str]:
    """Return `MODELS` with the models of other packages, name -> "module:Class"."""
    return with_entry_points("cm3.models", MODELS)


def spec_class(name: str) -> type[ModelSpec]:
    """Return the spec class of a model; its module imports no torch.

    Raises:
        KeyError: no model of this name.
    """
    module, _, attribute = models()[name].partition(":")
    found: type[ModelSpec] = getattr(import_module(module), attribute)
    return found


def spec_classes() -> dict[str, type[ModelSpec]]:
    """Return the spec classes of all models by name."""
    return {name: spec_class(name) for name in models()}


def named_spec(data: Mapping[str, Any], where: str = "model") -> type[ModelSpec]:
    """Return the spec class that `data["name"]` names, `DEFAULT_MODEL` without a name.

    Raises:
        UserError: no such model; `where` is the key path of the section.
    """
    name = data.get("name", DEFAULT_MODEL)
    if name not in models():
        raise UserError(f"{where}.name = {name!r}: no such model{nearest(str(name), models())}")
    return spec_class(name)


def parse_model(data: Mapping[str, Any], where: str = "model") -> ModelSpec:
    """Return validated settings of the model that `data` names; `where` is the key path of the section.

    Raises:
        UserError: an unknown model or key, a wrong type, or a value out of range.
    """
    return validate(named_spec(data, where), dict(data), where)
