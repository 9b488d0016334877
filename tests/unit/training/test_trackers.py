"""Experiment trackers: real libraries where they are installed, stand-ins for what goes wrong."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_shop import OUTPUTS, history, one_thread, run, shop, written

import cm3.training.loop
from cm3.common.errors import UserError
from cm3.config import Training
from cm3.training.trackers import Trackers, flat, numbers

__all__ = ["one_thread", "shop"]


def test_trackers_are_off_by_default_and_change_no_key():
    assert Training().trackers == []
    assert Training(trackers=["mlflow", "wandb"]).identity() == Training().identity()


def test_mlflow_gets_settings_curves_metrics_and_paths(shop, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    facts = run(shop, Path("results/run"), training={"trackers": ["mlflow"]})
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("cm3").experiment_id])
    assert found.info.status == "FINISHED" and found.data.tags["folder"] == "results/run"
    assert found.data.params["model.embedding_dim"] == "8" and found.data.params["training.lr"] == "0.02"
    curve = client.get_metric_history(found.info.run_id, "valid_recall_at_20")
    rows = history(Path("results/run"))
    assert [(m.step, m.value) for m in curve] == [(int(r["epoch"]), float(r["valid_recall@20"])) for r in rows]
    assert found.data.metrics["final.best_valid"] == facts["best_valid"]
    assert found.data.tags["output.model.safetensors"] == "results/run/model.safetensors"


def test_a_resumed_run_is_one_run_in_mlflow(shop, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    save = cm3.training.loop.TrainingRun.save

    def die(self):
        save(self)
        if self.state.epoch == 3:
            raise KeyboardInterrupt

    settings = {"trackers": ["mlflow"], "checkpoint_seconds": 0}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cm3.training.loop.TrainingRun, "save", die)
        run(shop, Path("results/run"), training=settings)
    run(shop, Path("results/run"), training=settings)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("cm3").experiment_id])
    steps = [m.step for m in client.get_metric_history(found.info.run_id, "loss")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_wandb_works_offline(shop, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(shop, Path("results/run"), training={"trackers": ["wandb"]})
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-results-run")
    assert list(folder.glob("*.wandb"))
    assert len(written(Path("results/run"))) == len(OUTPUTS)


class Recorder:
    """A stand-in for W&B: what it was given, in order; raises at the n-th call of log."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at, self.calls, self.summary, self.started = fails_at, [], {}, {}

    def init(self, **settings):
        self.started = settings
        return self

    def log(self, row, step):
        if len(self.calls) + 1 == self.fails_at:
            raise ConnectionError("no route to host")
        self.calls.append((step, row))

    def finish(self):
        self.calls.append("finished")


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_tracker_that_fails_does_not_stop_training(shop, tmp_path, monkeypatch, caplog, fails_at):
    recorder = Recorder(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    run(shop, tmp_path / "tracked", training={"trackers": ["wandb"]})
    run(shop, tmp_path / "plain")
    assert written(tmp_path / "tracked") == written(tmp_path / "plain")
    assert recorder.started["config"]["training"]["lr"] == 0.02
    if fails_at:
        assert len(recorder.calls) == 1 and "wandb: failed" in caplog.text
        return
    assert [call[0] for call in recorder.calls[:-1]] == list(range(1, 7)) and recorder.calls[-1] == "finished"
    assert recorder.summary["output/model.safetensors"].endswith("tracked/model.safetensors")
    assert json.dumps(recorder.calls)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"training\.trackers: mlflow is not installed .*pip install mlflow-skinny"):
        Trackers(["mlflow"], tmp_path, {})


def test_a_tracker_that_cannot_be_reached_is_left_out(tmp_path, monkeypatch, caplog):
    def refuse(**settings):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    Trackers(["wandb"], tmp_path, {}).add({"epoch": 1, "loss": 0.5})
    assert "wandb: cannot be reached" in caplog.text


def test_settings_and_rows_are_flattened():
    assert flat({"model": {"a": 1, "b": {"c": 2}}, "d": [3]}) == {"model.a": 1, "model.b.c": 2, "d": [3]}
    assert numbers({"epoch": 3, "loss": 1, "valid": None, "name": "x", "on": True}) == {"loss": 1.0}
