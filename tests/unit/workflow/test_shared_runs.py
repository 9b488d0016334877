"""Experiments with equal settings are trained once, in the folder of one of them."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_config import config

from workflow.plan import comparison, pages, publish, runs
from workflow.plan.config import Config, load_config
from workflow.prune import unused, used_by
from workflow.search.driver import ExperimentSearch

STUDY = {"experiments": ["shop", "again"], "seeds": [1, 2]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def raw(*order: str, study: dict[str, Any] | None = None, **experiments: Any) -> dict[str, Any]:
    """The small shop with `shop`, its equal `again` and others, in an order that begins as given."""
    whole = config(study, again={"like": "shop"}, **experiments)
    ordered = dict.fromkeys([*order, *whole["experiments"]])
    whole["experiments"] = {name: whole["experiments"][name] for name in ordered}
    return whole


def finish(loaded: Config, *experiments: str, run: str | None = None) -> None:
    """Write the record of a finished training into the folder of each experiment."""
    for name in experiments:
        record = Path(f"results/{name}/runs/{run or runs.selected_run(loaded, name)}/train.stage.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("{}")


def trained_in(loaded: Config, *experiments: str) -> list[str]:
    return [runs.trained_in(loaded, name, runs.selected_run(loaded, name)) for name in experiments]


def test_equal_settings_have_one_key_whatever_their_name_preset_and_evaluation():
    loaded = load_config(
        raw(cut={"like": "shop", "evaluation": {"ks": [3]}}, other={"like": "shop", "training": {"lr": 1}})
    )
    keys = [runs.selected_run(loaded, name) for name in ("shop", "again", "cut", "other")]
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0]


def test_without_a_finished_training_the_first_experiment_trains():
    assert trained_in(load_config(raw()), "shop", "again", "ease") == ["shop", "shop", "ease"]
    assert trained_in(load_config(raw("again")), "shop", "again") == ["again", "again"]


def test_a_finished_training_is_used_wherever_it_is():
    finish(load_config(raw()), "again")
    assert trained_in(load_config(raw()), "shop", "again") == ["again", "again"]
    third = raw(third={"like": "shop"})
    finish(load_config(third), "third")
    assert trained_in(load_config(third), "shop", "again", "third") == ["again", "again", "third"]


def test_without_its_experiment_or_folder_a_training_is_found_or_made_elsewhere():
    finish(load_config(raw()), "shop", "again")
    shutil.rmtree("results/shop")
    assert trained_in(load_config(raw()), "shop") == ["again"]
    without = raw()
    del without["experiments"]["again"]
    assert trained_in(load_config(without), "shop") == ["shop"]
    shutil.rmtree("results/again")
    assert trained_in(load_config(raw()), "shop", "again") == ["shop", "shop"]


def test_an_experiment_that_trains_on_another_device_trains_itself_unless_one_has_finished():
    whole = raw(on_cpu={"like": "shop", "training": {"device": "cpu"}})
    assert trained_in(load_config(whole), "shop", "again", "on_cpu") == ["shop", "shop", "on_cpu"]
    finish(load_config(whole), "again")
    assert trained_in(load_config(whole), "shop", "again", "on_cpu") == ["again", "again", "again"]


def test_in_an_object_storage_the_order_decides():
    loaded = replace(load_config(raw()), local=False)
    finish(loaded, "again")
    assert trained_in(loaded, "shop", "again") == ["shop", "shop"]


def test_a_decision_stays_while_the_training_is_repeated():
    loaded = load_config(raw(study=STUDY))
    finish(loaded, "again")
    before = comparison.compare_call(loaded, "compared")
    run = runs.selected_run(loaded, "shop")
    assert runs.trained_in(loaded, "shop", run) == "again"
    shutil.rmtree("results")
    finish(loaded, "shop")
    assert trained_in(loaded, "shop", "again") == ["again", "again"]
    assert comparison.compare_call(loaded, "compared") == before
    # A process that reads the configuration again begins with the decisions of the one that planned its job.
    job = load_config(raw(study=STUDY))
    job.decisions.update(json.loads(json.dumps(loaded.decisions)))
    job = copy.deepcopy(job)  # as Snakemake does for `run:`
    assert trained_in(job, "shop", "again") == ["again", "again"]
    assert comparison.compare_call(job, "compared") == before
    assert trained_in(load_config(raw(study=STUDY)), "shop", "again") == ["shop", "shop"]


def test_all_that_is_made_from_a_training_takes_it_from_there():
    rerank = {"model": {"name": "rerank", "of": "again", "by": ["ease"]}, "dataset": "shop"}
    loaded = load_config(raw(study=STUDY, both=rerank, same=rerank | {"evaluation": {"ks": [10]}}))
    finish(loaded, "shop")
    run = runs.selected_run(loaded, "again")
    trained, own = f"results/shop/runs/{run}", f"results/again/runs/{run}"
    assert runs.evaluate_inputs(loaded, "again", run)["item_embeddings"] == f"{trained}/item_embeddings.parquet"
    published = publish.publish_inputs(loaded, "again")
    assert published["model"] == f"{trained}/model.safetensors" and published["history"] == f"{trained}/history.csv"
    assert published["per_user"] == f"{own}/per_user.parquet"
    for inputs in (published, pages.experiment_page_inputs(loaded, "again")):
        assert inputs["record.train"] == f"{trained}/train.stage.json"
        assert inputs["record.evaluate"] == f"{own}/evaluate.stage.json"
    seed_1 = comparison.compare(loaded, "compared").spec["cells"][0]["run"]
    compared = comparison.compare_inputs(loaded, "compared")
    assert compared[f"train.again.{seed_1}"] == f"results/shop/runs/{seed_1}/train.stage.json"
    assert compared[f"evaluation.again.{seed_1}"] == f"results/again/runs/{seed_1}/evaluation.json"
    fitted = runs.selected_run(loaded, "same")
    assert runs.train_inputs(loaded, "both", fitted)["again.user_embeddings"] == f"{trained}/user_embeddings.parquet"
    assert runs.evaluate_inputs(loaded, "same", fitted)["rerank"] == f"results/both/runs/{fitted}/model.json"


def test_a_search_finds_the_runs_of_other_experiments():
    search = {"trials": 2, "spaces": {"again": {"model.gamma": [0.5, 0.9]}}}
    loaded = load_config(raw(study={"experiments": ["again"], "search": search, "seeds": [42]}))
    one = ExperimentSearch(loaded, "compared", "again")
    run = runs.selected_run(loaded, "shop")
    assert one.run_folder(run) == Path(f"results/shop/runs/{run}")
    assert one.run_folder("0" * 12) == Path(f"results/again/runs/{'0' * 12}")


def test_the_list_of_a_study_changes_with_the_places_of_its_trainings():
    loaded = load_config(raw(study=STUDY))
    listed, compared = comparison.study_runs(loaded, "compared"), comparison.compare(loaded, "compared")
    assert listed.identity != compared.identity
    for run in runs.runs_of(loaded, "again"):
        finish(loaded, "shop", "again", run=run)
    loaded = load_config(raw(study=STUDY))
    assert comparison.study_runs(loaded, "compared").identity == compared.identity


def test_an_experiment_whose_extractor_is_not_here_disturbs_no_other(monkeypatch: pytest.MonkeyPatch):
    whole = raw("lost", lost={"like": "shop", "modalities": {"text": "gone"}})
    whole["extractors"]["gone"] = {**whole["extractors"]["words"], "model": "missing/folder"}
    assert trained_in(load_config(whole), "again") == ["shop"]


def test_a_warm_start_is_not_from_a_run_of_its_own_name():
    start = {"like": "shop", "training": {"warm_start": "results/warm"}}
    loaded = load_config(raw("warm", warm=start, next=start))
    for name in (
        "model.safetensors",
        "user_embeddings.parquet",
        "interactions.parquet",
        "items.parquet",
        "users.parquet",
    ):
        Path("results/warm").mkdir(parents=True, exist_ok=True)
        Path("results/warm", name).touch()
    assert trained_in(loaded, "next") == ["next"]
    assert runs.train_inputs(loaded, "next", runs.selected_run(loaded, "next"))


def test_pruning_lists_no_training_that_another_experiment_uses():
    loaded = load_config(raw())
    finish(loaded, "shop")
    Path(runs.run_folder(loaded, "again")).mkdir(parents=True)
    Path(runs.run_folder(loaded, "again"), "evaluation.json").touch()
    loaded = load_config(raw("again"))
    assert trained_in(loaded, "again") == ["shop"]
    assert unused(loaded, used_by(loaded)) == []
    without = copy.deepcopy(raw())
    del without["experiments"]["shop"]
    without["experiments"]["again"] = raw()["experiments"]["shop"]
    for name in ("noise", "lightgcn", "ease", "content"):
        without["experiments"][name]["like"] = "again"
    loaded = load_config(without)
    assert trained_in(loaded, "again") == ["again"]
    assert [entry.path for entry in unused(loaded, used_by(loaded))] == [
        Path("results/shop/runs", runs.selected_run(loaded, "again"))
    ]
