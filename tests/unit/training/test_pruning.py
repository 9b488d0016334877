"""Runs that a search ends early: the decision, what is left, and that such a run can go on to its end."""

from pathlib import Path

import pytest
from training_shop import TRAINING, history, one_thread, run, shop, written

import cm3.training.loop
from cm3.common.errors import UserError
from cm3.common.files import read_json, write_json
from cm3.training.pruning import BATCH_VARIABLE, Batch, Finished, Judge, Member, PrunedError, Pruner, Report, read_trial

__all__ = ["one_thread", "shop"]

MEDIAN = Pruner(name="median", startup_trials=2, warmup_epochs=2)


def finished(*levels: float, epochs: int = 6) -> list[Finished]:
    return [
        Finished(state="complete", score=level * epochs, epochs={at: level * at for at in range(1, epochs + 1)})
        for level in levels
    ]


def batch(tmp_path: Path, folder: Path, earlier: list[Finished], pruner: Pruner = MEDIAN) -> Path:
    member = Member(experiment="shop", number=len(earlier), report=str(tmp_path / "report.json"))
    path = tmp_path / "batch.json"
    whole = Batch(pruner=pruner, runs={folder.as_posix(): member}, earlier={"shop": earlier})
    write_json(path, whole.model_dump(mode="json"))
    return path


def test_a_run_below_the_median_is_pruned_after_the_warm_up():
    earlier = finished(0.1, 0.2, 0.3)
    scores = {at: 0.15 * at for at in range(1, 7)}
    assert Judge(MEDIAN, earlier, 3).epoch(scores) == 2
    assert Judge(MEDIAN, earlier, 3).epoch({at: 0.25 * at for at in range(1, 7)}) is None
    assert Judge(MEDIAN, earlier[:1], 1).epoch(scores) is None, "too few finished runs"
    assert Judge(Pruner(name="none"), earlier, 3).epoch(scores) is None


@pytest.mark.parametrize("name", ["median", "percentile", "successive-halving"])
def test_scores_one_by_one_give_the_same_decision(name: str):
    pruner = Pruner(name=name, startup_trials=1, warmup_epochs=1)
    earlier = [*finished(0.1, 0.4, 0.3, 0.2, 0.5), Finished(state="failed", epochs={1: 0.0})]
    earlier.append(Finished(state="pruned", score=0.2, epochs={1: 0.1, 2: 0.2}))
    scores = {1: 0.3, 2: 0.35, 3: 0.4, 4: 0.4}
    whole = Judge(pruner, earlier, 7).epoch(scores)
    step, found = Judge(pruner, earlier, 7), None
    for at in scores:
        found = step.epoch({epoch: scores[epoch] for epoch in scores if epoch <= at})
        if found is not None:
            break
    assert found == whole is not None
    assert Judge(pruner, earlier, 9).epoch(scores) == whole, "running trials of the batch have no influence"


def test_a_pruned_run_keeps_its_checkpoint_and_can_go_on(shop, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv(BATCH_VARIABLE, str(batch(tmp_path, folder, finished(0.9, 0.9, 0.9))))
    with pytest.raises(PrunedError, match="the search ended this run: pruned after epoch 2; its checkpoint is kept"):
        run(shop, folder)
    report = Report.model_validate(read_json(tmp_path / "report.json"), strict=False)
    assert (report.state, list(report.epochs)) == ("pruned", [1, 2])
    assert not list(folder.glob("*.*")) and list((folder / "checkpoints").iterdir())
    with pytest.raises(PrunedError, match="after epoch 2"):
        run(shop, folder)
    monkeypatch.delenv(BATCH_VARIABLE)
    run(shop, folder)
    run(shop, tmp_path / "whole")
    assert written(folder) == written(tmp_path / "whole")
    column = [float(row["valid_recall@20"]) for row in history(folder)]
    assert column[:2] == list(report.epochs.values())


def test_a_run_is_not_pruned_at_its_last_epoch(shop, tmp_path, monkeypatch):
    pruner = Pruner(name="median", startup_trials=2, warmup_epochs=TRAINING["epochs"])
    monkeypatch.setenv(BATCH_VARIABLE, str(batch(tmp_path, tmp_path / "run", finished(0.9, 0.9), pruner)))
    run(shop, tmp_path / "run")
    assert not (tmp_path / "report.json").exists()


def test_runs_outside_of_the_batch_are_not_pruned(tmp_path, monkeypatch):
    monkeypatch.setenv(BATCH_VARIABLE, str(batch(tmp_path, tmp_path / "run", finished(0.9, 0.9))))
    assert read_trial(tmp_path / "other") is None and read_trial(tmp_path / "run") is not None
    monkeypatch.delenv(BATCH_VARIABLE)
    assert read_trial(tmp_path / "run") is None


def test_a_loss_that_is_not_finite_leaves_a_report(shop, tmp_path, monkeypatch):
    monkeypatch.setenv(BATCH_VARIABLE, str(batch(tmp_path, tmp_path / "run", finished(0.0, 0.0))))

    def diverge(self, loss):
        if self.state.epoch == 3:
            raise cm3.training.loop.DivergedError("epoch 3, batch 1: the loss is not finite")

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "check_finite", diverge)
    with pytest.raises(UserError, match="epoch 3, batch 1: the loss is not finite"):
        run(shop, tmp_path / "run")
    report = Report.model_validate(read_json(tmp_path / "report.json"), strict=False)
    assert report.state == "failed" and "not finite" in report.reason and list(report.epochs) == [1, 2]
