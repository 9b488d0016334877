"""Several processes that share each batch train the same model as one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, run, shop

import cm3.common.distributed
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
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
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
    kept = tmp_path / "checkpoints/last.safetensors"
    for _ in range(10):  # A busy machine may see the checkpoint too late, when the run has ended.
        started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while started.poll() is None and not kept.exists():
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        if kept.exists():
            break
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
    _, stderr = started.communicate(timeout=600)
    assert started.returncode == 143, stderr
    assert "the checkpoint is written" in stderr and not (tmp_path / "model.safetensors").exists()


@pytest.mark.integration
def test_a_loss_that_is_not_finite_ends_all_with_its_message(shop, tmp_path):
    done = train(shop, tmp_path, 2, {"lr": 1e30}, check=False)
    assert done.returncode == 1 and "the loss is not finite" in done.stderr


def test_a_model_without_ddp_is_refused(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(cm3.model.model.CM3, "supports_ddp", False)
    fit = cm3.training.loop.fit
    monkeypatch.setattr("cm3.training.train.fit", lambda *given: fit(*given[:7], ProcessShard(0, 2), *given[8:]))
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


def started_by_torchrun(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHELASTIC_RUN_ID", "run")
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        patch.setenv(name, str(value))
    for name, value in {"init_process_group": None, "get_rank": 0, "get_world_size": 2}.items():
        patch.setattr(torch.distributed, name, lambda *arguments, value=value: value)


def test_a_teardown_that_hangs_does_not_hide_the_error(monkeypatch):
    started_by_torchrun(monkeypatch)
    released, alarms = threading.Event(), []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: released.wait(300))
    monkeypatch.setattr(cm3.common.distributed, "TEARDOWN_SECONDS", 0.1)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    started = time.monotonic()
    with pytest.raises(UserError, match="out of memory"), process_group(torch.device("cpu")):
        raise UserError("out of memory")
    assert time.monotonic() - started < 120
    assert alarms == [cm3.common.distributed.EXIT_SECONDS], "the kernel ends a process that does not end itself"
    released.set()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_process_that_cannot_end_is_ended():
    code = """
import atexit, os, threading, torch
from cm3.common import distributed as ours
ours.TEARDOWN_SECONDS, ours.EXIT_SECONDS = 0.1, 1
hang = threading.Event().wait
for name, value in {"init_process_group": None, "get_rank": 0, "get_world_size": 2}.items():
    setattr(torch.distributed, name, lambda *arguments, value=value: value)
torch.distributed.destroy_process_group = hang
os.environ |= {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "RANK": "0"}
atexit.register(hang)
with ours.process_group(torch.device("cpu")):
    raise ValueError("the reason")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == -signal.SIGALRM and "the reason" in done.stderr


def test_a_group_that_ended_well_is_left_once(monkeypatch):
    started_by_torchrun(monkeypatch)
    left = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(1))
    with process_group(torch.device("cpu")) as shard:
        assert shard == ProcessShard(0, 2)
    assert left == [1]


def test_processes_that_drew_different_batches_are_an_error(shop, tmp_path, monkeypatch):
    """As GPUs of different models may from the same seed."""
    calls = []

    def gather(found, mine):
        calls.append(mine)
        found[:] = [mine, ("0123456789ab", "NVIDIA A100")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    fit = cm3.training.loop.fit
    monkeypatch.setattr("cm3.training.train.fit", lambda *given: fit(*given[:7], ProcessShard(0, 2), *given[8:]))
    with pytest.raises(
        UserError, match=r"different batches .*process 0 on cpu has .*process 1 on NVIDIA A100 has 0123"
    ):
        run(shop, tmp_path)
    assert len(calls) == 1


def test_equal_draws_are_equal(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine] * 2)
    )
    ProcessShard(0, 2).check_equal([torch.arange(3)], "batches")
