"""Steps on tensors of fixed shape, and their CUDA graph, equal the steps that are launched one kernel at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from fake_device import Launches, fake_device, moved
from fake_graph import FakeGraph, fake_cuda_graphs
from torch import Tensor
from training_shop import one_thread

from cm3.common.errors import UserError
from cm3.config import Model, Training
from cm3.evaluation.ranking import Validation
from cm3.model.model import build_model
from cm3.model.sampling import Sampler
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.cuda_graph import GraphedStep, StaticStep, are_full, graphed_step
from cm3.training.loop import TrainingRun
from cm3.training.schedule import GracefulStop, grouped

__all__ = ["one_thread"]

USERS, ITEMS, BATCH = 40, 70, 100
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "several batches, clipped": ({"detach_similarity": True}, {"batches_per_step": 2, "clip_norm": 0.1}),
    "weight decay, warm-up": (
        {"calibration": False},
        {"weight_decay": 1e-3, "schedule": "cosine", "warmup_epochs": 1.5},
    ),
    "repeated ids": ({"dedup_pairs": False}, {}),
    "three layers": ({"n_mm_layers": 2, "uniformity_items": "positive"}, {}),
}


def matrix(shape: tuple[int, int]) -> sp.csr_matrix:
    # Few popular ids and many rare ones: the number of distinct ids varies between batches.
    popularity = 0.6 / (1 + np.arange(shape[1])) ** 0.4
    return sp.csr_matrix((np.random.default_rng(0).random(shape) < popularity).astype(np.float32))


def a_run(variant: str, device: str = "cpu", **more: Any) -> TrainingRun:
    """A run in float64, in which rounding errors do not grow by Adam's division."""
    settings, training = VARIANTS[variant]
    chosen = Training(batch_size=BATCH, epochs=3, lr=0.02, monitor="recall@5", **training | more)
    model = Model(embedding_dim=8, slerp="fused", **settings)
    rng = np.random.default_rng(1)
    features = [rng.standard_normal((ITEMS, width)).astype(np.float32) for width in (6, 7)]
    observed = matrix((USERS, ITEMS))
    network = build_model(features, observed, matrix((ITEMS, ITEMS)), model, 0).double().to(device)
    users, items = (torch.from_numpy(ids.astype(np.int64)).to(device) for ids in observed.nonzero())
    sampler = Sampler(
        users,
        items,
        ITEMS,
        batch_size=BATCH,
        negative_sampling=model.uniformity_items,
        dedup_pairs=model.dedup_pairs,
        seed=0,
    )
    return TrainingRun(
        network, sampler, Validation(observed, observed * 0, "recall@5", device), chosen, NullCheckpoint(), None
    )


def epochs(run: TrainingRun, number: int = 2) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train; return the recorded values of each epoch's steps, and the parameters."""
    recorded = []
    for _ in range(number):
        with GracefulStop(enabled=False) as stop:
            run.epoch(stop)
        recorded.append(run.state.losses.clone().cpu())
        run.state.epoch, run.state.step = run.state.epoch + 1, 0
    return recorded, {name: p.detach().cpu() for name, p in run.model.named_parameters()}


def first_inputs(run: TrainingRun) -> tuple[Any, tuple[Tensor, ...]]:
    return next(grouped(run.sampler.epoch(1), run.per_step)), run.model.random_draws(0)


def assert_same(run: TrainingRun, other: TrainingRun, rtol: float = 1e-9) -> None:
    for ours, theirs in zip(epochs(run), epochs(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_on_padded_batches_equals_the_step(variant, device):
    plain, static = a_run(variant, device), a_run(variant, device)
    batches, draws = first_inputs(static)
    static.static_step = StaticStep(static.static_gradients, batches, draws)
    values = static.static_step.run(batches, draws)
    gradients = [p.grad for p in static.model.parameters()]
    expected = plain.static_gradients(batches, draws)
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
    for ours, parameter in zip(gradients, plain.model.parameters(), strict=True):
        assert ours is not None and parameter.grad is not None
        assert (ours - parameter.grad).abs().max() <= 1e-14 * parameter.grad.abs().max()
    assert_same(static, plain)


def test_batches_are_padded_with_ids_that_do_not_count():
    run = a_run("default")
    batches, draws = first_inputs(run)
    static = StaticStep(run.static_gradients, batches, draws)
    (room,) = static.batches
    n = len(batches[0].counted_negatives.ids)
    assert len(room.counted_negatives.ids) > n and int(room.counted_negatives.ids.max()) < ITEMS
    for batch in list(run.sampler.epoch(2))[:-1]:
        assert static.fits([batch])
        static.run([batch], draws)
        ids, counts = room.counted_negatives.ids, room.counted_negatives.counts
        assert counts is not None and torch.equal(
            torch.bincount(ids, counts.double(), ITEMS), torch.bincount(batch.negatives, minlength=ITEMS).double()
        )
        assert torch.equal(ids[room.counted_negatives.positions], batch.negatives)


def test_a_step_of_another_size_does_not_fit():
    run = a_run("several batches, clipped")
    batches, draws = first_inputs(run)
    static = StaticStep(run.static_gradients, batches, draws)
    last = list(grouped(run.sampler.epoch(1), run.per_step))[-1]
    assert static.fits(batches) and not static.fits(batches[:1]) and not static.fits(last)
    assert are_full(batches, 2, BATCH) and not are_full(batches[:1], 2, BATCH) and not are_full(last, 2, BATCH)
    for name in ("counted_users", "counted_negatives"):
        more = replace(getattr(batches[1], name), ids=torch.arange(BATCH + 1))
        assert not static.fits([batches[0], replace(batches[1], **{name: more})])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_static_step_is_the_same_operations_whatever_the_batch(variant):
    """Without a wait, a tensor on the host or a shape that depends on values: what a capture needs."""
    run = a_run(variant)
    run.model.float()
    steps = list(grouped(run.sampler.epoch(1), run.per_step))[:-1]
    distinct = {len(batch.counted_users.ids) for batches in steps for batch in batches}
    assert len(distinct) > 1 or variant == "repeated ids"
    draws = run.model.random_draws(0)
    traces = []
    with fake_device():
        moved(run.model, "meta")
        static = StaticStep(run.static_gradients, moved(steps[0], "meta"), moved(draws, "meta"))
        for batches in steps[:3]:
            static.run(moved(batches, "meta"), moved(draws, "meta"))
            with Launches("meta", capturing=True) as launches:
                static.compute()
            traces.append(launches.trace)
    assert len(traces) > 1 and all(trace == traces[0] and len(trace) > 100 for trace in traces)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replayed_graph_equals_the_steps(variant):
    """On the CPU by a graph that repeats the recorded operations; steps of another size run outside it, in turns."""
    plain, graphed = a_run(variant), a_run(variant)
    graphed.capture_due = True
    with fake_cuda_graphs():
        assert_same(graphed, plain)
    step = graphed.static_step
    assert isinstance(step, GraphedStep) and isinstance(step.graph, FakeGraph)
    assert step.graph.replays == 2 * (plain.steps - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_equals_the_steps(variant, device):
    graphed = a_run(variant, device, cuda_graph=True)
    assert_same(graphed, a_run(variant, device, cuda_graph=False))
    assert isinstance(graphed.static_step, GraphedStep)


def test_a_step_that_cannot_be_captured(caplog):
    run = a_run("default")
    batches, draws = first_inputs(run)

    def waits(batches, draws):
        return run.static_gradients(batches, draws) + len(torch.nonzero(draws[0]))

    arguments = (waits, run.model.parameters(), batches, draws)
    with fake_cuda_graphs():
        assert graphed_step(*arguments, required=False) is None
        assert "cannot be captured (operation not permitted" in caplog.text and "without a graph" in caplog.text
        with pytest.raises(UserError, match=r"training\.cuda_graph = true: .*cannot be captured .*auto or false"):
            graphed_step(*arguments, required=True)


@pytest.mark.parametrize("setting", [False, True, "auto"])
def test_on_the_cpu_the_setting_changes_nothing(setting):
    plain, run = a_run("default"), a_run("default", cuda_graph=setting)
    for ours, theirs in zip(epochs(run, 1), epochs(plain, 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert run.static_step is None
    assert run.settings.identity() == plain.settings.identity()
