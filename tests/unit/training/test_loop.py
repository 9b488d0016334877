"""The training loop: what it records, how it groups batches, and what it does when things go wrong."""

import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_shop import OUTPUTS, history, one_thread, run, shop, written

import cm3.model.model
import cm3.model.network
import cm3.model.streams
import cm3.training.loop
import cm3.training.memory
from cm3.common.errors import UserError
from cm3.config import Training
from cm3.evaluation.ranking import Ranking
from cm3.model.bfloat16_pairs import Bfloat16Pairs
from cm3.model.model import Modality
from cm3.model.sampling import derived_seed
from cm3.training.schedule import batches_per_step

__all__ = ["one_thread", "shop"]


def outputs(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@contextmanager
def stopping(monkeypatch, at):
    """Stop a training after it has written its checkpoint number `at`."""
    save, saves = cm3.training.loop.TrainingRun.save, itertools.count(1)

    def save_and_stop(self):
        save(self)
        if next(saves) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cm3.training.loop.TrainingRun, "save", save_and_stop)
        yield


def test_curves_are_the_history_also_of_a_run_that_was_stopped(shop, tmp_path, monkeypatch):
    training = {"tensorboard": True, "checkpoint_seconds": 0, "epochs": 3}
    run(shop, tmp_path, training=training)
    rows = history(tmp_path)
    tags = {
        "loss": "training/loss",
        "alignment": "training/alignment",
        "user_uniformity": "training/user_uniformity",
        "item_uniformity": "training/item_uniformity",
        "grad_norm": "training/grad_norm",
        "fused_cosine": "training/fused_cosine",
        "valid_recall@20": "validation/recall@20",
        **{f"stream_weight_{name}": f"stream weight/{name}" for name in ("text", "image", "fused")},
    }
    assert set(rows[0]) == {"epoch", *tags}
    for column, tag in tags.items():
        expected = [(int(row["epoch"]), float(row[column])) for row in rows]
        assert curves(tmp_path)[tag] == [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in expected]
    assert sum(float(rows[0][f"stream_weight_{name}"]) for name in ("text", "image", "fused")) == pytest.approx(1)

    # Killed after the third epoch was drawn and before its checkpoint: the epoch is done, and drawn, again.
    save, saves = cm3.training.loop.TrainingRun.save, 0

    def save_then_die(self):
        nonlocal saves
        saves += self.state.epoch == 3 and self.state.step == 0
        if saves:
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cm3.training.loop.TrainingRun, "save", save_then_die)
        run(shop, tmp_path / "stopped", training=training)
    run(shop, tmp_path / "stopped", training=training)
    assert curves(tmp_path / "stopped") == curves(tmp_path)


def test_no_curves_are_written_where_none_are_wanted(shop, tmp_path):
    run(shop, tmp_path, training={"tensorboard": False, "epochs": 1})
    assert not (tmp_path / "tensorboard").exists()


def test_the_gradient_norm_is_the_mean_over_the_steps(shop, tmp_path, monkeypatch):
    seen = []
    step = cm3.training.loop.TrainingRun.step

    def look(self, batches):
        step(self, batches)
        gradients = [p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None]
        seen.append(math.sqrt(sum(gradients)))

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", look)
    run(shop, tmp_path, training={"epochs": 2})
    means = np.array(seen).reshape(2, -1).mean(1)
    assert [float(row["grad_norm"]) for row in history(tmp_path)] == [pytest.approx(mean, rel=1e-5) for mean in means]


def test_the_gradient_norm_is_from_before_it_is_clipped(shop, tmp_path):
    one_step = {"epochs": 1, "batches_per_step": 1000}
    run(shop, tmp_path / "free", training=one_step)
    run(shop, tmp_path / "clipped", training=one_step | {"clip_norm": 1e-3})
    norms = [float(history(tmp_path / name)[0]["grad_norm"]) for name in ("free", "clipped")]
    assert norms[0] == norms[1] > 1e-3


def test_a_checkpoint_without_gradient_norms_is_resumed(shop, tmp_path, monkeypatch):
    """Those of 0.1.0 have none; all else is as in a run without a stop."""
    training = {"checkpoint_seconds": 0, "epochs": 3}
    run(shop, tmp_path / "whole", training=training)
    with stopping(monkeypatch, at=4), pytest.raises(KeyboardInterrupt):
        run(shop, tmp_path / "stopped", training=training)
    path = tmp_path / "stopped/checkpoints/last.safetensors"
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"parts": tensors["parts"][:, :-1].contiguous()}, path, header)
    run(shop, tmp_path / "stopped", training=training)
    whole, stopped = outputs(tmp_path / "whole"), outputs(tmp_path / "stopped")
    assert {name for name in whole if whole[name] != stopped[name]} <= {"history.csv"}
    rows = [[row | {"grad_norm": ""} for row in history(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1\nncclUnhandledCudaError: out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(shop, tmp_path, monkeypatch, error):
    def fail(self, batches):
        raise error

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", fail)
    with pytest.raises(
        UserError, match=r"^training on cpu ran out of memory .*batch_size \(now 64\).*bfloat16"
    ) as found:
        run(shop, tmp_path)
    assert "\n" not in str(found.value)
    error = RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        run(shop, tmp_path)


def test_the_precision_that_ran_is_recorded(shop, tmp_path):
    for asked, ran in (("float32", "float32"), ("tf32", "float32"), ("bfloat16", "bfloat16")):
        assert run(shop, tmp_path / asked, training={"precision": asked, "epochs": 1})["precision"] == ran
    first = [float(history(tmp_path / name)[0]["loss"]) for name in ("float32", "tf32")]
    assert first[0] == pytest.approx(first[1], rel=1e-6), "a CPU has no TF32"


@pytest.mark.parametrize("per_step", [2, 3, 1000])
def test_batches_that_share_a_step(shop, tmp_path, monkeypatch, per_step):
    steps = []
    step = cm3.training.loop.TrainingRun.step

    def count(self, batches):
        steps.append(len(batches))
        step(self, batches)

    monkeypatch.setattr(cm3.training.loop.TrainingRun, "step", count)
    run(shop, tmp_path / "one", training={"epochs": 1})
    n_batches = len(steps)
    steps.clear()
    run(shop, tmp_path / "more", training={"epochs": 1, "batches_per_step": per_step})
    assert sum(steps) == n_batches and len(steps) == math.ceil(n_batches / per_step)
    assert set(steps[:-1]) <= {per_step}
    assert outputs(tmp_path / "one") != outputs(tmp_path / "more")


@pytest.mark.parametrize(
    ("pairs", "batch_size", "expected"),
    [
        (66_542, 2048, 1),
        (66_542, 256, 1),
        (119_674, 2048, 1),
        (200_000, 2048, 1),
        (359_022, 2048, 3),
        (1_196_740, 2048, 11),
        (1_196_740, 8192, 2),
        (10_000_000, 2048, 97),
    ],
)
def test_automatic_batches_per_step_follow_from_the_pairs(pairs, batch_size, expected):
    assert batches_per_step(Training(batches_per_step="auto", batch_size=batch_size), pairs) == expected
    assert batches_per_step(Training(batches_per_step=4, batch_size=batch_size), pairs) == 4


def test_automatic_batches_per_step_are_in_the_facts_of_a_run(shop, tmp_path, monkeypatch):
    run(shop, tmp_path / "one", training={"epochs": 2})
    facts = run(shop, tmp_path / "auto", training={"epochs": 2, "batches_per_step": "auto"})
    assert facts["batches_per_step"] == 1 and history(tmp_path / "one") == history(tmp_path / "auto")
    monkeypatch.setattr(cm3.training.loop, "batches_per_step", lambda settings, n_pairs: 3)
    facts = run(shop, tmp_path / "more", training={"epochs": 2, "batches_per_step": "auto"})
    run(shop, tmp_path / "three", training={"epochs": 2, "batches_per_step": 3})
    assert facts["batches_per_step"] == 3 and history(tmp_path / "more") == history(tmp_path / "three")


def test_a_validation_projects_the_items_once(shop, tmp_path, monkeypatch):
    calls, forward = [], cm3.model.model.Modality.forward

    def count(self):
        calls.append(torch.is_grad_enabled())
        return forward(self)

    monkeypatch.setattr(cm3.model.model.Modality, "forward", count)
    run(shop, tmp_path, training={"epochs": 2})
    assert calls.count(False) == 2 * 2  # epochs, modalities


def test_a_run_of_shared_steps_goes_on_to_the_same_bytes(shop, tmp_path, monkeypatch):
    training = {"batches_per_step": 2, "checkpoint_seconds": 0, "epochs": 3}
    run(shop, tmp_path / "whole", training=training)
    with stopping(monkeypatch, at=4), pytest.raises(KeyboardInterrupt):
        run(shop, tmp_path / "stopped", training=training)
    run(shop, tmp_path / "stopped", training=training)
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "stopped")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(shop, tmp_path, monkeypatch):
    mixing = cm3.model.model.mixing_parameters

    def spoilt(alpha, n, device, seed):
        t = mixing(alpha, n, device, seed)
        return t * math.nan if seed == derived_seed(42, 2, 1) else t

    monkeypatch.setattr(cm3.model.model, "mixing_parameters", spoilt)
    kept = tmp_path / "checkpoints/last.safetensors"
    with pytest.raises(UserError, match=r"epoch 2, batch 2: .* Norms of the parameters: users \d.*last\.safetensors"):
        run(shop, tmp_path, training={"checkpoint_seconds": 1000})
    assert kept.exists()
    monkeypatch.undo()
    run(shop, tmp_path, training={"checkpoint_seconds": 1000})
    run(shop, tmp_path / "whole")
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


def test_bfloat16_trains_to_nearly_the_same_model(shop, tmp_path):
    exact = run(shop, tmp_path / "float32")
    rough = run(shop, tmp_path / "bfloat16", training={"precision": "bfloat16"})
    assert outputs(tmp_path / "float32") != outputs(tmp_path / "bfloat16")
    first = [float(history(tmp_path / name)[0]["loss"]) for name in ("float32", "bfloat16")]
    assert first[0] == pytest.approx(first[1], abs=0.01)
    assert abs(exact["best_valid"] - rough["best_valid"]) < 0.1


def test_bfloat16_is_that_of_features_and_pairs(shop, tmp_path, monkeypatch, caplog):
    pairs, features = [], []
    compute, project = Bfloat16Pairs.apply, Modality.forward
    monkeypatch.setattr(Bfloat16Pairs, "apply", lambda *given: pairs.append(1) or compute(*given))
    monkeypatch.setattr(Modality, "forward", lambda self: features.append(self.features.dtype) or project(self))
    run(shop, tmp_path / "float32", training={"epochs": 1})
    assert not pairs and set(features) == {torch.float32}
    features.clear()
    monkeypatch.setattr("cm3.training.train.has_fast_bfloat16", lambda device: False)
    run(shop, tmp_path / "bfloat16", training={"epochs": 1, "precision": "bfloat16"})
    assert pairs and set(features) == {torch.bfloat16}
    assert "this CPU has no instructions for it; float32 is faster" in caplog.text


def test_ranking_halves_its_blocks_when_memory_runs_out(caplog):
    rng = np.random.default_rng(0)
    users, items = torch.from_numpy(rng.standard_normal((37, 4))), torch.from_numpy(rng.standard_normal((50, 4)))
    masked = sp.csr_matrix(rng.random((37, 50)) < 0.2)
    expected = Ranking(np.arange(37), masked).top(users, items, 5)
    sizes = []

    def scarce(rows):
        sizes.append(len(rows.unique()))  # blocks are padded with repeated rows
        if len(rows) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return users[rows] @ items.T

    ranking = Ranking(np.arange(37), masked)
    for _ in range(2):
        found = ranking.top_by(scarce, 5)
        np.testing.assert_array_equal(found[0], expected[0])
    assert "blocks of 5 users" in caplog.text
    assert sizes[:4] == [37, 19, 10, 5] and set(sizes[4:]) <= {5, 2}, "what was learnt is kept"

    def hopeless(rows):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        ranking.top_by(hopeless, 5)


def test_what_large_models_do_for_memory_changes_no_byte(shop, tmp_path, monkeypatch):
    training = {"batches_per_step": 2, "epochs": 3}
    run(shop, tmp_path / "small", training=training)
    given_back = []
    for place in (cm3.training.memory, cm3.model.network, cm3.model.streams):
        monkeypatch.setattr(place, "return_free_memory", lambda place=place.__name__: given_back.append(place))
    monkeypatch.setattr(cm3.model.network, "LARGE_MODEL", 0)
    monkeypatch.setattr(cm3.model.model, "LARGE_ACTIVATION", 0)
    monkeypatch.setattr(cm3.model.streams, "CPU_TABLE_BYTES", 1)
    run(shop, tmp_path / "large", training=training)
    assert set(given_back) == {"cm3.training.memory", "cm3.model.network", "cm3.model.streams"}
    assert written(tmp_path / "large") == written(tmp_path / "small")
