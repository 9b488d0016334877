"""Lists of another tool in the plan: their file is an input, its content and not its path decides the key."""

import copy
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL

from cm3.common.errors import UserError
from workflow.plan import comparison, publish, runs
from workflow.plan.config import Config, load_config


def configured(**settings: Any) -> Config:
    raw = copy.deepcopy(SMALL)
    raw["experiments"]["other"] = {"dataset": "shop", "model": {"name": "external"} | settings}
    raw["studies"] = {"both": {"experiments": ["shop", "other"], "seeds": [1, 2]}}
    return load_config(raw)


def test_the_file_is_an_input_of_its_check_and_of_evaluation(tmp_path: Path):
    file = tmp_path / "lists.csv"
    file.write_text("user,item,rank\n")
    config = configured(recommendations=str(file))
    run = runs.selected_run(config, "other")
    assert runs.train_inputs(config, "other", run)["lists"] == str(file)
    inputs = runs.evaluate_inputs(config, "other", run)
    assert inputs["lists"] == str(file) and inputs["external"] == f"results/other/runs/{run}/model.json"
    task = runs.train(config, "other", run)
    assert (task.stage, task.spec["monitor"]) == ("external", "recall@20") and str(file) not in str(task.spec)
    assert publish.publish_inputs(config, "other")["model"] == f"results/other/runs/{run}/model.json"
    cells = [cell for cell in comparison.compare(config, "both").spec["cells"] if cell["experiment"] == "other"]
    assert {cell["run"] for cell in cells} == {run} and len(cells) == 2


def test_columns_are_in_the_key_and_the_path_is_not():
    keys = {
        name: runs.selected_run(configured(**settings), "other")
        for name, settings in {
            "one": {"recommendations": "a.csv"},
            "moved": {"recommendations": "b/c.csv"},
            "scores": {"recommendations": "a.csv", "score_column": "score"},
        }.items()
    }
    assert keys["one"] == keys["moved"] != keys["scores"]


def test_a_missing_file_is_named():
    config = configured(recommendations="absent.csv")
    with pytest.raises(UserError, match=r"model\.recommendations = 'absent\.csv': no such file"):
        runs.train_inputs(config, "other", runs.selected_run(config, "other"))
