"""Searches with a stand-in for training: the same trials however often it is stopped, budgets, pruning, refusals."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from study_config import checked, config, refused

from cm3.common.errors import UserError
from cm3.common.files import read_json, write_json
from cm3.training.pruning import Batch, Judge
from workflow.plan import comparison
from workflow.plan.config import load_config
from workflow.plan.runs import runs_of, settings_of
from workflow.search import driver
from workflow.search.driver import search
from workflow.search.trials import Journal

SPACES: dict[str, Any] = {
    "shop": {"model.gamma": {"low": 0, "high": 2}, "model.fusion": ["bezier", "mean"]},
    "ease": {"model.l2": {"low": 1, "high": 1000, "log": True}},
}
PRUNER = {"name": "median", "startup_trials": 2, "warmup_epochs": 1}


def study(**changes: Any) -> dict[str, Any]:
    settings = {"trials": 8, "batch": 3, "spaces": SPACES, "pruner": PRUNER} | changes
    return {"experiments": ["shop", "ease", "lightgcn"], "seeds": [3, 4], "search": settings}


class Workflow:
    """Trains the runs of a batch at once: a score for each epoch from the settings.

    Attributes:
        trained: keys of the runs, in order.
        prunes: ends runs as training does; otherwise all are trained to their end.
        broken: number of further runs that fail without a report.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.prunes, self.broken, self.diverging = True, 0, False

    def __call__(self, targets: Sequence[str], options: Sequence[str], batch: Path, printed: Path) -> int:
        running = Batch.model_validate(read_json(batch), strict=False)
        states = read_json(f"results/{batch.parts[1]}/search.json")["experiments"]
        for target in targets:
            folder = Path(target).parent
            experiment, run = folder.parts[1], folder.name
            if (folder / "train.stage.json").exists():
                continue
            if self.broken:
                self.broken -= 1
                continue
            values = next(t["values"] for t in states[experiment]["trials"] if t["run"] == run)
            self.train(folder, experiment, values, running)
        return 0

    def train(self, folder: Path, experiment: str, values: dict[str, Any], batch: Batch) -> None:
        member = batch.runs[folder.as_posix()]
        self.trained.append(folder.name)
        level = 0.5 - abs(values.get("model.gamma", 0.4) - 0.7) / 4 - 0.1 * (values.get("model.fusion") == "mean")
        level -= abs(values.get("model.l2", 100) - 100) / 1e4
        scores = {epoch: level * epoch / 5 for epoch in range(1, 6)} if experiment == "shop" else {}
        report = {"epochs": scores, "seconds": 1.0}
        if self.diverging and values.get("model.fusion") == "mean":
            write_json(member.report, report | {"state": "failed", "reason": "the loss is not finite"})
            return
        epoch = Judge(batch.pruner, batch.earlier[experiment], member.number).epoch(scores)
        if self.prunes and epoch not in (None, 5):
            scores = {at: score for at, score in scores.items() if at <= epoch}
            write_json(member.report, report | {"epochs": scores, "state": "pruned", "reason": f"after {epoch}"})
            return
        folder.mkdir(parents=True)
        if scores:
            with (folder / "history.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([["epoch", "valid_recall@20"], *scores.items()])
        facts = {"best_valid": max(scores.values(), default=level), "epochs": len(scores), "wall_seconds": 900.0}
        write_json(folder / "train.stage.json", facts)


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.chdir(tmp_path)
    found = Workflow()
    monkeypatch.setattr(driver, "snakemake", found)
    return found


def found(states: dict[str, Any], without: Sequence[str] = ("seconds",)) -> dict[str, list[Any]]:
    return {
        name: [{key: v for key, v in t.model_dump().items() if key not in without} for t in state.trials]
        for name, state in states.items()
    }


def afresh(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    return search(checked(study(**changes)), "compared", [])


def test_the_same_search_gives_the_same_trials(workflow, tmp_path, monkeypatch):
    first = search(checked(study()), "compared", [])
    assert {name: len(state.trials) for name, state in first.items()} == {"shop": 8, "ease": 8}
    assert all(state.finished for state in first.values())
    assert found(afresh(tmp_path / "again", monkeypatch)) == found(first)
    other = afresh(tmp_path / "other", monkeypatch, seed=1)
    assert found(other)["ease"][1:] != found(first)["ease"][1:]


def test_the_own_settings_are_the_first_trial(workflow):
    states = search(checked(study()), "compared", [])
    own = checked(study()).experiments["shop"].model
    assert states["shop"].trials[0].values == {"model.gamma": own.gamma, "model.fusion": own.fusion}


@pytest.mark.parametrize("stops", [1, 2, 4, 5, 9])
def test_a_killed_search_goes_on_to_the_same_trials(workflow, tmp_path, monkeypatch, stops):
    add, calls = Journal.add, 0

    def die(self, trial):
        nonlocal calls
        calls += 1
        if calls == stops:
            raise KeyboardInterrupt
        add(self, trial)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "add", die)
        search(checked(study()), "compared", [])
    before = list(workflow.trained)
    resumed = search(checked(study()), "compared", [])
    complete = [t.run for state in resumed.values() for t in state.trials if t.state == "complete"]
    assert all(workflow.trained.count(run) == 1 for run in complete), "finished runs are not trained again"
    assert workflow.trained[: len(before)] == before
    assert found(resumed) == found(afresh(tmp_path / "whole", monkeypatch))


def test_a_larger_budget_continues_the_search(workflow, tmp_path, monkeypatch):
    search(checked(study(trials=4)), "compared", [])
    assert found(search(checked(study()), "compared", [])) == found(afresh(tmp_path / "whole", monkeypatch))


def test_a_finished_search_runs_nothing(workflow):
    search(checked(study()), "compared", [])
    trained = list(workflow.trained)
    search(checked(study()), "compared", [])
    assert workflow.trained == trained


def test_outcomes_do_not_depend_on_what_is_cached(workflow, tmp_path, monkeypatch):
    states = search(checked(study()), "compared", [])
    pruned = [t for t in states["shop"].trials if t.state == "pruned"]
    assert pruned and all(t.reason == f"pruned after epoch {t.epochs}" and t.epochs < 5 for t in pruned)
    workflow.prunes = False
    assert found(afresh(tmp_path / "full", monkeypatch)) == found(states)


def test_no_pruner_ends_no_trial(workflow):
    states = search(checked(study(pruner={"name": "none"})), "compared", [])
    assert {t.state for t in states["shop"].trials} == {"complete"}


@pytest.mark.parametrize("sampler", ["random", "gp"])
def test_other_samplers_repeat_their_trials(workflow, tmp_path, monkeypatch, sampler):
    first = search(checked(study(sampler=sampler, trials=5)), "compared", [])
    assert found(afresh(tmp_path / "again", monkeypatch, sampler=sampler, trials=5)) == found(first)


def test_hours_bound_the_training_of_each_experiment(workflow):
    settings = study(pruner={"name": "none"}, hours=1.0)
    del settings["search"]["trials"]
    states = search(checked(settings), "compared", [])
    assert {name: len(state.trials) for name, state in states.items()} == {
        "shop": 6,
        "ease": 6,
    }  # 900 s each, batches of 3


def test_a_loss_that_is_not_finite_is_a_failed_trial(workflow):
    workflow.diverging = True
    states = search(checked(study()), "compared", [])
    failed = [t for t in states["shop"].trials if t.values["model.fusion"] == "mean"]
    assert failed and all(t.state == "failed" and t.reason == "the loss is not finite" for t in failed)
    assert all(t.values["model.fusion"] == "bezier" for t in states["shop"].best(3))


def test_a_broken_run_stops_the_search_which_then_goes_on(workflow, tmp_path, monkeypatch):
    workflow.broken = 2
    with pytest.raises(UserError, match=r"2 runs of the search failed .*logs/compared/search\.log says why"):
        search(checked(study()), "compared", [])
    assert found(search(checked(study()), "compared", [])) == found(afresh(tmp_path / "whole", monkeypatch))


def test_a_journal_cut_by_a_kill_goes_on(workflow, tmp_path, monkeypatch):
    search(checked(study(trials=4)), "compared", [])
    (journal,) = Path("results/compared/search").glob("shop-*.journal")
    journal.write_bytes(journal.read_bytes()[:-40])
    assert found(search(checked(study()), "compared", [])) == found(afresh(tmp_path / "whole", monkeypatch))


def test_a_file_that_is_no_journal_is_refused(workflow):
    search(checked(study()), "compared", [])
    (journal,) = Path("results/compared/search").glob("shop-*.journal")
    journal.write_text('{"op_code": 77}\n{"other": 1}\n')
    with pytest.raises(UserError, match="not a readable journal"):
        search(checked(study()), "compared", [])


def test_values_that_exclude_each_other_are_failed_trials(workflow):
    space = {"model.min_sim": {"low": 0, "high": 1}, "model.max_sim": {"low": 0, "high": 1}}
    states = search(checked(study(spaces={"shop": space})), "compared", [])
    failed = [t for t in states["shop"].trials if t.values["model.min_sim"] > t.values["model.max_sim"]]
    assert failed and all(t.state == "failed" and "exclude" in t.reason for t in failed)


def test_the_comparison_waits_for_the_search(workflow):
    for raw, reason in (
        (study(), "the search has not started"),
        (study(trials=20), r"has not used up its budget \(8 trials\)"),
        (study(batch=2), "the settings have changed since the search"),
        (study(spaces={"shop": {"model.gamma": [0.5]}}), "the settings have changed since the search"),
    ):
        with pytest.raises(
            UserError, match=rf"studies\.compared\.search: shop: .*{reason}.*Run: \./run search compared"
        ):
            comparison.compare(checked(raw), "compared")
        search(checked(study()), "compared", [])


def test_the_best_trials_are_compared_over_all_seeds(workflow):
    states = search(checked(study()), "compared", [])
    settings = checked(study(finalists=2))
    spec = comparison.compare(settings, "compared").spec
    points = [cell["point"] for cell in spec["cells"] if cell["experiment"] == "shop"]
    best = [t.values for t in states["shop"].best(2)]
    assert points == [best[0], best[0], best[1], best[1]]
    assert [cell["seed"] for cell in spec["cells"] if cell["experiment"] == "shop"] == [3, 4, 3, 4]
    assert {t["run"] for t in spec["search"]["experiments"]["shop"]["trials"]} <= set(runs_of(settings, "shop"))
    assert states["shop"].best(1)[0].run in {cell["run"] for cell in spec["cells"]}
    assert "evaluation.shop" in " ".join(comparison.compare_inputs(settings, "compared"))


def test_runs_of_trials_can_be_made_by_name(workflow):
    states = search(checked(study()), "compared", [])
    for trial in states["shop"].trials:
        settings = settings_of(checked(study()), "shop", trial.run)
        assert settings.model.gamma == trial.values["model.gamma"] and settings.training.seed == 3


def test_importance_is_stored_with_the_finished_search(workflow):
    states = search(checked(study(trials=12)), "compared", [])
    assert states["shop"].importance.keys() == SPACES["shop"].keys()
    assert sum(states["shop"].importance.values()) == pytest.approx(1)
    assert json.loads(Path("results/compared/search.json").read_text())["experiments"]["shop"]["finished"]


def test_an_unreadable_state_is_no_state(workflow):
    search(checked(study()), "compared", [])
    Path("results/compared/search.json").write_text("{")
    assert not load_config(config(study())).studies["compared"].trials["shop"]
    search(checked(study()), "compared", [])
    assert len(load_config(config(study())).studies["compared"].trials["shop"]) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": None}, "give a budget: trials, hours or both"),
        ({"spaces": {}}, "at least 1"),
        ({"spaces": {"shop": {}}}, "spaces.shop is empty"),
        ({"spaces": {"shoop": {"model.gamma": [1]}}}, "search.spaces.shoop: the study has no experiment 'shoop'"),
        ({"spaces": {"shop": {"model.gama": [1]}}}, "search.spaces.shop.model.gama: unknown key of cm3"),
        ({"spaces": {"shop": {"training.seed": [1]}}}, "training.seed: seeds are not chosen by validation"),
        ({"spaces": {"ease": {"training.lr": [1]}}}, "ease is computed in closed form"),
        ({"spaces": {"shop": {"model.fusion": ["bezier", "bezzier"]}}}, "spaces.shop.model.fusion = 'bezzier'"),
        ({"spaces": {"shop": {"model.gamma": {"low": -1, "high": 1}}}}, "spaces.shop.model.gamma = -1"),
        ({"spaces": {"shop": {"model.gamma": {"low": 2, "high": 1}}}}, "low 2 is not below high 1"),
        ({"spaces": {"shop": {"model.gamma": {"low": 0, "high": 1, "log": True}}}}, "low 0 has no logarithm"),
        ({"spaces": {"shop": {"model.n_ui_layers": {"low": 1, "high": 2.5}}}}, "model.n_ui_layers = 2.5"),
        ({"spaces": {"shop": {"model.gamma": [1, 1]}}}, "spaces.shop.model.gamma: duplicate value"),
        ({"sampler": "tp"}, "search.sampler = 'tp'"),
        ({"pruner": {"name": "medan"}}, "search.pruner.name = 'medan'"),
        ({"budget": 3}, "search.budget: unknown key"),
    ],
)
def test_a_wrong_search_is_refused(changes: dict[str, Any], message: str):
    assert message in refused(config(study(**changes)))


def test_a_grid_and_a_search_of_one_experiment_are_refused():
    raw = study() | {"grids": {"shop": {"model.gamma": [0.5]}}}
    assert "spaces.shop: the experiment has a grid, too" in refused(config(raw))


def test_whole_numbers_stay_whole(workflow):
    space = {"model.n_ui_layers": {"low": 1, "high": 4}, "model.gamma": {"low": 0, "high": 1}}
    states = search(checked(study(spaces={"shop": space})), "compared", [])
    assert all(isinstance(t.values["model.n_ui_layers"], int) for t in states["shop"].trials)
    assert any(t.values["model.gamma"] % 1 for t in states["shop"].trials)
