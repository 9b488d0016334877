"""Configurations of a study on the small shop."""

import copy
from typing import Any

import pytest
from checkout import SMALL

from cm3.common.errors import UserError
from workflow.plan import comparison
from workflow.plan.config import Config, load_config

EXPERIMENTS: dict[str, Any] = {
    "noise": {"like": "shop", "control": "gaussian"},
    "lightgcn": {"like": "shop", "model": {"name": "lightgcn"}},
    "ease": {"like": "shop", "model": {"name": "ease"}},
    "content": {"like": "shop", "model": {"name": "itemknn-content"}},
}


def config(study: dict[str, Any] | None = None, /, **experiments: Any) -> dict[str, Any]:
    """The small shop with more experiments, and a study `compared`."""
    whole = copy.deepcopy(SMALL)
    whole["experiments"] |= copy.deepcopy(EXPERIMENTS) | experiments
    if study is not None:
        whole["studies"] = {"compared": study}
    return whole


def checked(study: dict[str, Any] | None = None, /, **experiments: Any) -> Config:
    return load_config(config(study, **experiments))


def compared_runs(settings: Config) -> list[dict[str, Any]]:
    """The runs of the study `compared`, as the comparison gets them."""
    return comparison.compare(settings, "compared").spec["cells"]


def refused(whole: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        load_config(whole)
    return str(error.value)
