"""A run that was stopped or killed goes on, to the same bytes; a state of anything else is never resumed."""

import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, prepared, run, shop, stage_command, written  # noqa: F401

import cm3.training.adam
import cm3.training.loop
from cm3.common.errors import UserError
from cm3.config import Training
from cm3.training.checkpoint import Checkpoint
from cm3.training.schedule import lr_factor


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9, 13])
@pytest.mark.parametrize("eval_embeddings", ["fresh", "last_batch"])
def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_never_was(
    shop, tmp_path, monkeypatch, stop_after, eval_embeddings, device
):
    training = {"checkpoint_seconds": 0, "eval_embeddings": eval_embeddings, "device": device}
    run(shop, tmp_path / "whole", training=training)
    save, stops = Checkpoint.save, 0

    def save_then_stop(self, tensors, state):
        nonlocal saves
        save(self, tensors, state)
        saves += 1
        if saves == stop_after:
            raise Stopped

    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    while True:
        saves = 0
        try:
            run(shop, tmp_path / "stopped", training=training)
            break
        except Stopped:
            stops += 1
    assert stops >= 1
    stopped, whole = written(tmp_path / "stopped"), written(tmp_path / "whole")
    if device == "cpu":
        assert stopped == whole
    else:  # the sparse product of a GPU sums in no fixed order
        losses = [[float(row["loss"]) for row in history(tmp_path / name)] for name in ("stopped", "whole")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.integration
def test_a_killed_process_goes_on_to_the_same_bytes(shop, tmp_path):
    training = TRAINING | {"epochs": 12}
    run(shop, tmp_path / "whole", training=training, code="c0de")

    folder = tmp_path / "killed"
    runtime = {"checkpoint_seconds": 0, "threads": torch.get_num_threads()}
    command = stage_command(shop, folder, training, runtime, code="c0de")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    checkpoint, chance, resumed, stopped = folder / "checkpoints/last.safetensors", random.Random(0), False, 0
    for _ in range(10):  # A busy machine may see a checkpoint too late, when the run has ended.
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        resumed |= "resuming from the checkpoint" in process.communicate()[1]
        stopped += process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
        if stopped == 2:
            break
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "resuming from the checkpoint" in last.stderr or resumed
    record = json.loads((folder / "record.json").read_text())
    assert (
        record["stage"] == "cm3.training.train"
        and record["epochs"] == len(history(folder))
        and record["peak_memory_mb"] > 0
    )
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == written(tmp_path / "whole")
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(shop, tmp_path, monkeypatch, caplog, number):
    training = {"checkpoint_seconds": 1000, "epochs": 4, "schedule": "cosine", "warmup_epochs": 0.5, "clip_norm": 0.5}
    run(shop, tmp_path / "whole", training=training)
    step, steps = cm3.training.loop.TrainingRun.step, 0

    def step_then_signal(*arguments):
        nonlocal steps
        steps += 1
        done = step(*arguments)
        if steps in (2, 7):
            os.kill(os.getpid(), number)
            if number == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)  # from the job's watch of Snakemake, which has ended by then
        return done

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", step_then_signal)
    before = signal.getsignal(number)
    for _ in range(2):
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            run(shop, tmp_path / "stopped", training=training)
        if number == signal.SIGTERM:
            assert stopped.value.code == 143
        assert (tmp_path / "stopped/checkpoints/last.safetensors").exists()
    assert signal.getsignal(number) is before
    with caplog.at_level(logging.INFO):
        run(shop, tmp_path / "stopped", training=training)
    assert "resuming from the checkpoint" in caplog.text
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_moments_on_disk_give_the_same_bytes_also_in_a_run_that_was_stopped(shop, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    run(shop, tmp_path / "memory", code="one")
    monkeypatch.setattr(cm3.training.adam, "MAPPED_FROM", 1)
    mapped, made = cm3.training.adam.mapped_zeros, []
    monkeypatch.setattr(cm3.training.adam, "mapped_zeros", lambda shape: made.append(shape) or mapped(shape))
    step, steps = cm3.training.loop.TrainingRun.step, 0

    def step_then_signal(*arguments):
        nonlocal steps
        steps += 1
        done = step(*arguments)
        if steps == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", step_then_signal)
    training = {"optimizer_state": "disk", "checkpoint_seconds": 1000}
    with pytest.raises(SystemExit):
        run(shop, tmp_path / "disk", training=training, code="one")
    assert made and not list(temporary.iterdir())
    run(shop, tmp_path / "disk", code="one")  # the setting is not part of what a checkpoint belongs to
    assert written(tmp_path / "disk") == written(tmp_path / "memory")
    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", step)
    made.clear()
    run(shop, tmp_path / "whole", training=training, code="one")
    assert made and written(tmp_path / "whole") == written(tmp_path / "memory")


def test_learning_rates_follow_their_schedule():
    def factors(**settings):
        chosen = Training(**settings)
        return [lr_factor(chosen, epoch, batch, 4) for epoch in (1, 2, 3) for batch in range(4)]

    assert factors() == [1.0] * 12
    assert factors(warmup_epochs=1.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(warmup_epochs=0.6)[:4] == pytest.approx([0.25 / 0.6, 0.5 / 0.6, 1.0, 1.0])
    assert factors(warmup_epochs=0.1)[0] == 1.0
    assert factors(schedule="exponential", lr_decay=0.5)[::4] == [1.0, 0.5, 0.25]
    cosine = factors(schedule="cosine", epochs=3)
    assert cosine == sorted(cosine, reverse=True) and cosine[0] == 1.0
    assert cosine[6] == pytest.approx(0.5) and cosine[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 11 / 12)))


def test_a_clipped_gradient_changes_the_run_and_a_loose_limit_does_not(shop, tmp_path):
    outputs = {}
    for name, training in (
        ("none", {}),
        ("loose", {"clip_norm": 1e6}),
        ("tight", {"clip_norm": 1e-3, "weight_decay": 0.1}),
    ):
        run(shop, tmp_path / name, training=training | {"epochs": 2})
        outputs[name] = written(tmp_path / name)["history.csv"]
    assert outputs["loose"] == outputs["none"] != outputs["tight"]


@pytest.mark.parametrize("change", ["code", "model", "training", "inputs"])
def test_a_checkpoint_of_other_code_settings_or_inputs_is_not_resumed(shop, tmp_path, monkeypatch, caplog, change):
    save = Checkpoint.save

    def save_then_stop(self, tensors, state):
        save(self, tensors, state)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoint, "save", save_then_stop)
        run(shop, tmp_path / "out", code="one", training={"checkpoint_seconds": 0})
    changes = {
        "code": {"code": "two"},
        "model": {"code": "one", "model": {"gamma": 0.4}},
        "training": {"code": "one", "training": {"lr": 0.01}},
        "inputs": {"code": "one"},
    }[change]
    if change == "inputs":
        (tmp_path / "data").mkdir()
        shop = prepared(tmp_path / "data", seed=9)
    with caplog.at_level(logging.WARNING):
        run(shop, tmp_path / "out", **changes)
    assert "starting from the beginning" in caplog.text
    run(shop, tmp_path / "clean", **changes)
    assert written(tmp_path / "out") == written(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "flip", "zeros", "state"])
def test_a_damaged_checkpoint_is_removed_and_the_run_ends_as_if_uninterrupted(
    shop, tmp_path, caplog, monkeypatch, damage
):
    training = {"checkpoint_seconds": 0, "epochs": 2}
    run(shop, tmp_path / "whole", training=training)
    save = Checkpoint.save

    def save_then_stop(self, tensors, state):
        save(self, tensors, state)
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Checkpoint, "save", save_then_stop)
        run(shop, tmp_path / "out", training=training)
    path = tmp_path / "out/checkpoints/last.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1000] ^= 4
    elif damage == "zeros":
        content[-1000:-900] = bytes(100)
    elif damage == "state":
        place = content.index(b'epoch\\": ') + 10
        content[place] ^= 1
    path.write_bytes({"garbage": b"half a file", "empty": b"", "cut": content[:-1]}.get(damage, content))
    with caplog.at_level(logging.WARNING):
        run(shop, tmp_path / "out", training=training)
    assert f"{path}: damaged" in caplog.text
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_folder_in_the_place_of_the_checkpoint_is_named(shop, tmp_path):
    (tmp_path / "out/checkpoints/last.safetensors").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints/last\.safetensors: is a folder, but a file is expected"):
        run(shop, tmp_path / "out", training={"epochs": 1})


def test_a_full_disk_at_a_checkpoint_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"last\.safetensors: file too large\. Nothing half-written was kept"):
            Checkpoint(tmp_path, "f").save({"a": torch.zeros(1000)}, {"epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_best_epoch_of_the_stored_state_is_kept_until_the_next_state(tmp_path, caplog):
    def state(epoch):
        return {"epoch": epoch, "best": {"epoch": epoch, "valid": 0.5, "test": None}}

    def bests():
        return sorted(path.name for path in tmp_path.glob("best-*"))

    checkpoint = Checkpoint(tmp_path, "f")
    checkpoint.save_best(1, {"best_users": torch.ones(2)})
    checkpoint.save({"a": torch.zeros(3)}, state(1))
    checkpoint.save_best(2, {"best_users": torch.ones(2) * 2})
    checkpoint.save_best(3, {"best_users": torch.ones(2) * 3})
    assert bests() == ["best-1.safetensors", "best-3.safetensors"]
    resumed = Checkpoint(tmp_path, "f")
    assert resumed.load() and resumed.load_best(1)["best_users"].tolist() == [1, 1]
    resumed.save_best(2, {"best_users": torch.ones(2) * 2})
    assert bests() == ["best-1.safetensors", "best-2.safetensors"]
    resumed.save({"a": torch.zeros(3)}, state(2))
    assert bests() == ["best-2.safetensors"]

    file = tmp_path / "best-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert Checkpoint(tmp_path, "f").load() is None
    assert "best-2.safetensors" in caplog.text and "starting from the beginning" in caplog.text
    resumed.remove()
    assert not tmp_path.exists()


def test_embeddings_that_are_the_parameters_themselves_are_kept_as_tables_of_their_own(tmp_path):
    table = torch.arange(6.0).reshape(3, 2)
    checkpoint = Checkpoint(tmp_path, "f")
    checkpoint.save_best(1, {"best.nodes": table, "best_users": table[:2], "best_items": table[2:]})
    found = checkpoint.load_best(1)
    assert torch.equal(torch.cat([found["best_users"], found["best_items"]]), found["best.nodes"])
    assert torch.equal(found["best.nodes"], table)


def test_a_resume_may_change_the_checkpoint_interval(shop, tmp_path):
    shared = dict.fromkeys(("a", "b"))
    for name, seconds in (("a", 0), ("b", 1000)):
        run(shop, tmp_path / name, training={"checkpoint_seconds": seconds})
        shared[name] = written(tmp_path / name)
    assert shared["a"] == shared["b"]


def test_checkpoints_that_take_long_are_written_more_rarely(shop, tmp_path, monkeypatch):
    now, saved, save, step = [0.0], [], Checkpoint.save, cm3.training.loop.TrainingRun.step

    def slowly(self, tensors, state):
        saved.append(now[0])
        save(self, tensors, state)
        now[0] += 1

    def counted(self, batches):
        step(self, batches)
        now[0] += 1

    monkeypatch.setattr(cm3.training.loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoint, "save", slowly)
    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", counted)
    run(shop, tmp_path, training={"checkpoint_seconds": 2, "epochs": 20, "patience": 20})
    *due, finished = saved
    assert due[0] == 2 and [later - one for one, later in pairwise(due)] == [10.0] * (len(due) - 1)
    assert len(due) > 2 and finished == now[0] - 1
