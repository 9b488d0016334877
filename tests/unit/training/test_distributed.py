"""Several processes that share each batch train the same model as one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, run, shop

import cm3.training.loop
from cm3.common.distributed import ProcessShard, process_group
from cm3.common.errors import UserError
from cm3.config import Model, Training

__all__ = ["one_thread", "shop"]


def command(shop, folder: Path, processes: int, training=None, model=None) -> tuple[list[str], dict[str, str]]:
    """`python -m cm3.training.train` in some processes, and its environment."""
    settings = Training(**TRAINING | (training or {}))
    spec = {"modalities": ["text", "image"], "model": Model(**MODEL | (model or {})).identity()}
    runtime = {"device": "cpu", "checkpoint_seconds": settings.checkpoint_seconds, "tensorboard": False}
    words = [sys.executable, "-m", "cm3.training.train", "--spec", json.dumps(spec | {"training": settings.identity()})]
    words += ["--runtime", json.dumps(runtime | {"threads": processes, "processes": processes})]
    words += ["--log", str(folder / "train.log")]
    words += [part for name, path in shop.items() for part in ("--input", f"{name}={path}")]
    outputs = dict(zip(("model", "history", "users", "items"), OUTPUTS, strict=True)) | {"record": "record.json"}
    words += [part for name, path in outputs.items() for part in ("--output", f"{name}={folder / path}")]
    root = ROOT
    return words, os.environ | {"PYTHONPATH": str(root)}


def train(shop, folder: Path, processes: int, training=None, model=None, check=True):
    words, environment = command(shop, folder, processes, training, model)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_alike(folder: Path, other: Path, rel: float) -> None:
    for a, b in zip(history(folder), history(other), strict=True):
        for name, value in a.items():
            assert float(value) == pytest.approx(float(b[name]), rel=rel), (a["epoch"], name)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("training", "model"),
    [
        ({"epochs": 2}, {}),
        ({"epochs": 2, "batches_per_step": 2, "clip_norm": 0.3}, {"dedup_pairs": False, "calibration": False}),
    ],
)
def test_two_processes_give_the_results_of_one(shop, tmp_path, monkeypatch, training, model):
    (tmp_path / "two").mkdir()
    train(shop, tmp_path / "two", 2, training, model)
    run(shop, tmp_path / "one", training=training, model=model)
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-5)
    record = json.loads((tmp_path / "two/record.json").read_text())
    assert record["processes"] == 2 and record["epochs"] == 2
    assert (tmp_path / "two/train.log").read_text().count("epoch 2: loss") == 1, "one process writes the log"


@pytest.mark.integration
def test_a_killed_run_of_two_resumes_with_one(shop, tmp_path):
    training = {"checkpoint_seconds": 0, "epochs": 30, "patience": 40}
    words, environment = command(shop, tmp_path, 2, training)
    started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    kept = tmp_path / "checkpoints/last.safetensors"
    while started.poll() is None and not kept.exists():
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    assert "resuming from the checkpoint" in train(shop, tmp_path, 1, training).stderr
    run(shop, tmp_path / "whole", training=training)
    # Rounding differs between one process and two, and the model is chaotic: the first epochs are compared.
    losses = [[float(row["loss"]) for row in history(folder)][:5] for folder in (tmp_path, tmp_path / "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.integration
def test_sigterm_stops_all_with_a_checkpoint(shop, tmp_path):
    training = {"checkpoint_seconds": 0, "epochs": 1000, "patience": 1000}
    words, environment = command(shop, tmp_path, 2, training)
    started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "checkpoints/last.safetensors"
    while started.poll() is None and not kept.exists():
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    _, stderr = started.communicate(timeout=120)
    assert started.returncode == 143, stderr
    assert "the checkpoint is written" in stderr and not (tmp_path / "model.safetensors").exists()


@pytest.mark.integration
def test_a_loss_that_is_not_finite_ends_all_with_its_message(shop, tmp_path):
    done = train(shop, tmp_path, 2, {"lr": 1e30}, check=False)
    assert done.returncode == 1 and "the loss is not finite" in done.stderr


def test_a_model_without_ddp_is_refused(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(cm3.model.model.CM3, "supports_ddp", False)
    fit = cm3.training.loop.fit
    monkeypatch.setattr("cm3.training.train.fit", lambda *arguments: fit(*arguments[:-1], ProcessShard(0, 2)))
    with pytest.raises(UserError, match=r"training\.processes: this model supports one process only"):
        run(shop, tmp_path)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match=r"2 processes have 1 GPU,.* --resources gpu=2"),
        process_group(torch.device("cuda")),
    ):
        pass


def test_shards_are_a_partition():
    shards = [ProcessShard(rank, 3) for rank in range(3)]
    for n in (0, 1, 2, 7, 64):
        assert np.concatenate([np.arange(n)[shard.pairs(n)] for shard in shards]).tolist() == list(range(n))
        assert all(sum(shard.owns(block) for shard in shards) == 1 for block in range(n))
