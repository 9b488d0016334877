"""Versions decide, next to the settings, whether an output is up to date."""

import dataclasses
import re
from typing import Any

import pytest
import yaml
from checkout import SMALL
from repository import ROOT

from cm3.common import stages
from cm3.common.parts import Part
from workflow.plan import data, features, publish, runs
from workflow.plan.config import load_config
from workflow.plan.task import Task


class Other(Part):
    """A part that has no version yet."""

    libraries = ("numpy", "torch")


def versions() -> dict[str, str]:
    """The version of each stage of the small shop."""
    config = load_config(SMALL)
    run = runs.selected_run(config, "shop")
    tasks: dict[str, Any] = {
        "generate": data.generate(config, "shop"),
        "prepare": data.prepare(config, "shop"),
        "split": data.split(config, "shop"),
        "extract": features.extract(config, "words"),
        "reduce": features.reduce(config, "pca16"),
        "control": features.control(config, "text", "constant"),
        "similarity": features.similarity(config, "10"),
        "train": runs.train(config, "shop", run),
        "evaluate": runs.evaluate(config, "shop", run),
        "publish": publish.publish(config, "shop"),
    }
    return {stage: task.identity for stage, task in tasks.items()}


def test_a_version_names_the_stage_and_the_part_that_it_runs():
    assert Task("split", {}).version == "split 1"
    parts = {"text": type("Text", (Part,), {"version": 3, "libraries": ("torch", "timm")})(), "other": Other()}
    task = Task("extract", {}, parts)
    assert task.version == "extract 1, text 3, other " + Other.code_version()
    assert re.search(r"dev-[0-9a-f]{12}$", task.version)
    assert task.libraries == ["numpy", "timm", "torch"]
    found = versions()
    assert found["extract"].endswith(", version extract 1, sentence-transformers 1")
    assert found["prepare"].endswith(", version prepare 1, sample 1")
    assert found["train"].endswith(", version train 1, cm3 1")
    assert re.fullmatch(r"settings [0-9a-f]{12}, version split 1", found["split"])


@pytest.mark.parametrize(
    "stage", ["generate", "prepare", "split", "extract", "reduce", "similarity", "train", "evaluate"]
)
def test_a_raised_version_changes_the_identity_of_its_stage_alone(monkeypatch: pytest.MonkeyPatch, stage: str):
    before = versions()
    monkeypatch.setitem(stages.STAGES, stage, dataclasses.replace(stages.STAGES[stage], version=2))
    after = versions()
    assert {name for name in before if before[name] != after[name]} == {stage}


def test_every_profile_compares_versions_and_inputs_but_no_commands():
    for path in sorted((ROOT / "profiles").glob("*/profile.yaml")):
        triggers = yaml.safe_load(path.read_text())["rerun-triggers"]
        assert sorted(triggers) == ["input", "mtime", "params"], path
