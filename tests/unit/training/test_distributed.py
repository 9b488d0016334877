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
import scipy.sparse as sp
import torch
from repository import ROOT
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, run, shop

import cm3.common.distributed
import cm3.training.loop
from cm3.common.distributed import ProcessShard, process_group
from cm3.common.errors import UserError
from cm3.common.tensors import read_tensors
from cm3.config import Model, Training
from cm3.evaluation.ranking import Validation
from cm3.model.model import build_model
from cm3.training.adam import Adam

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
    ("processes", "training", "model"),
    [
        (2, {"epochs": 2}, {}),
        (2, {"epochs": 2, "batches_per_step": 2, "clip_norm": 0.3}, {"dedup_pairs": False, "calibration": False}),
        (4, {"epochs": 2, "eval_embeddings": "last_batch"}, {"item_graph": False}),  # more processes than streams
    ],
)
def test_several_processes_give_the_results_of_one(shop, tmp_path, processes, training, model):
    (tmp_path / "many").mkdir()
    train(shop, tmp_path / "many", processes, training, model)
    run(shop, tmp_path / "one", training=training, model=model)
    assert_alike(tmp_path / "many", tmp_path / "one", 1e-5)
    many, one = (read_tensors(tmp_path / folder / "model.safetensors")[0] for folder in ("many", "one"))
    assert {name: x.shape for name, x in many.items()} == {name: x.shape for name, x in one.items()}
    for name, x in one.items():
        np.testing.assert_allclose(many[name], x, atol=1e-4, err_msg=name)
    record = json.loads((tmp_path / "many/record.json").read_text())
    assert record["processes"] == processes and record["epochs"] == 2
    assert (tmp_path / "many/train.log").read_text().count("epoch 2: loss") == 1, "one process writes the log"


def kill_after_a_checkpoint(command, folder: Path) -> None:
    words, environment = command
    kept = folder / "checkpoints/last.safetensors"
    for _ in range(10):  # A busy machine may see the checkpoint too late, when the run has ended.
        started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while started.poll() is None and not kept.exists():
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        if kept.exists():
            break


@pytest.mark.integration
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_killed_run_resumes_with_another_number_of_processes(shop, tmp_path, first, then):
    training = {"checkpoint_seconds": 0, "epochs": 30, "patience": 40}
    kill_after_a_checkpoint(command(shop, tmp_path, first, training), tmp_path)
    assert "resuming from the checkpoint" in train(shop, tmp_path, then, training).stderr
    run(shop, tmp_path / "whole", training=training)
    # Rounding differs between one process and two, and the model is chaotic: the first epochs are compared.
    losses = [[float(row["loss"]) for row in history(folder)][:5] for folder in (tmp_path, tmp_path / "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_each_process_holds_its_streams_of_the_users_alone():
    shop = sp.random(9, 7, 0.4, "csr", random_state=0)
    features = [np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32) for _ in range(2)]
    whole = build_model(features, shop, sp.identity(7, format="csr"), Model(embedding_dim=3), 1)
    held = []
    for rank in range(4):
        model = build_model(features, shop, sp.identity(7, format="csr"), Model(embedding_dim=3), 1)
        model.split(ProcessShard(rank, 4))
        held.append(model.users.detach().clone())
        assert dict(model.named_parameters())["users"] is model.users
        assert torch.equal(model.own_part("users", whole.users), model.users)
        assert model.own_part("stream_logits", whole.stream_logits) is whole.stream_logits
        optimiser = Adam(model.parameters(), 0.1)
        model.users.grad = torch.ones_like(model.users)
        optimiser.step()
        moments = [x.numel() for key, x in optimiser.tensors().items() if "exp_avg" in key]
        assert moments == [model.users.numel()] * 2
    assert [x.shape[1] for x in held] == [0, 1, 1, 1]
    assert torch.equal(torch.cat(held, 1), whole.users)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_process_without_users_adds_nothing_to_the_score(monkeypatch, on_device):
    truth = sp.csr_matrix(([1.0], ([0], [2])), (1, 3))  # one user, two processes
    other = {0: torch.tensor([1.0, 1.0]), 1: torch.zeros(2)}
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, rank=rank: sums.add_(other[rank]))
        validation = Validation(truth, sp.csr_matrix((1, 3)), "recall@1", "cpu", on_device, ProcessShard(rank, 2))
        assert validation.score(torch.ones(1, 1), torch.tensor([[0.0], [1.0], [2.0]])) == 1


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
    assert "Traceback" not in stderr, "all processes stop together"


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
