"""The network and its loss against a dense float64 recomputation, and the sampler and settings that feed it."""

import gc
import weakref
from functools import partial

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cm3.config import Model
from cm3.model.model import CM3, _BFloat16Linear, build_model
from cm3.model.network import Embeddings, Loss, backward
from cm3.model.sampling import Batch, count_by_batch

USERS, ITEMS = 9, 7


def build(modalities: int, **changes: object) -> tuple[CM3, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(modalities)
    interactions = (rng.random((USERS, ITEMS)) < 0.4).astype(np.float32)
    graph = sp.csr_matrix(np.where(rng.random((ITEMS, ITEMS)) < 0.5, 0.25, 0).astype(np.float32))
    features = [torch.from_numpy(rng.standard_normal((ITEMS, 5 + m)).astype(np.float32)) for m in range(modalities)]
    torch.manual_seed(modalities)
    model = CM3(features, sp.csr_matrix(interactions), graph, Model(embedding_dim=6, **changes)).double()
    dense = {
        "adjacency": torch.from_numpy(oracle.dense_adjacency(interactions)),
        "graph": torch.from_numpy(graph.toarray()).double(),
    }
    return model, dense | {f"x{m}": x.double() for m, x in enumerate(features)}


def batch(dedup: bool = True, device: str = "cpu") -> Batch:
    users, items, negatives = (torch.tensor(x, device=device) for x in BATCH)
    return Batch(
        users,
        items,
        negatives,
        next(count_by_batch(users, len(users), dedup)),
        next(count_by_batch(negatives, len(users), dedup)),
    )


BATCH = ([0, 1, 2, 3, 1, 8], [1, 2, 3, 4, 6, 0], [5, 0, 2, 5, 3, 1])


CHANGES = [
    {"detach_similarity": True, "dedup_pairs": True},
    {"detach_similarity": False, "dedup_pairs": True, "max_sim": 0.8},
    {"detach_similarity": False, "dedup_pairs": False, "n_ui_layers": 4, "n_mm_layers": 2, "gamma": 0.5},
    {"detach_similarity": True, "dedup_pairs": False, "n_mm_layers": 0, "min_sim": 0.2, "slerp": "reference"},
]
ABLATIONS = [
    {"fusion": "mean"},
    {"fusion": "concat"},
    {"fusion": "linear"},
    {"calibration": False},
    {"item_graph": False},
]


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("changes", CHANGES + ABLATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_forward_loss_and_gradients(modalities, changes, dtype, tolerance, device):
    model, dense = build(modalities, **changes)
    chosen = model.settings
    t = torch.rand(ITEMS, dtype=torch.float64) * 0.9 + 0.05

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    features = [dense[f"x{m}"] for m in range(modalities)]
    users, items, fused = oracle.plain_forward(
        weights,
        features,
        dense["adjacency"],
        dense["graph"],
        t,
        chosen.n_ui_layers,
        chosen.n_mm_layers if chosen.item_graph else -1,
        chosen.fusion,
    )
    expected = oracle.plain_loss(
        users,
        items,
        fused,
        BATCH,
        chosen.gamma,
        (chosen.min_sim, chosen.max_sim),
        chosen.dedup_pairs,
        chosen.detach_similarity,
        chosen.calibration,
    )
    plain_gradients = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)

    model, t = model.to(device, dtype), t.to(device, dtype)
    embeddings = model(t)
    for found, plain in ((embeddings.users, users), (embeddings.items, items), (embeddings.fused, fused)):
        assert_near(found, plain, tolerance, "embeddings")
    # What a training step computes embeds the batch's users alone; it must be the same loss.
    model.sample_t = lambda seed: t
    some = batch(chosen.dedup_pairs, device)
    for run in (
        lambda: backward_of(model.loss(embeddings, some)),
        lambda: model.backward([some], 0),
        lambda: model.backward([some, some], 0),
    ):
        model.zero_grad()
        assert float(run().total) == pytest.approx(float(expected.detach()), rel=tolerance)
        for (name, parameter), plain in zip(model.named_parameters(), plain_gradients, strict=True):
            assert (parameter.grad is None) == (plain is None), name
            if plain is not None:
                assert_near(parameter.grad, plain, tolerance, name)


def backward_of(loss: Loss) -> Loss:
    loss.total.backward()
    return Loss(loss.total.detach(), loss.components)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Whether the largest error is small against the largest entry."""
    error = float((found.double().cpu() - expected).detach().abs().max())
    assert error <= tolerance * float(expected.detach().abs().max()), f"{name}: off by {error}"


def test_a_step_over_two_batches_is_the_mean_of_their_losses():
    model, _ = build(2)
    one, other = (
        batch(),
        Batch(
            *(torch.tensor(x) for x in ([5, 5], [0, 1], [2, 3])),
            *(next(count_by_batch(torch.tensor(x), 2, True)) for x in ([5, 5], [2, 3])),
        ),
    )
    embeddings = model.training_embeddings(3)
    losses = [model.loss(embeddings, some) for some in (one, other)]
    ((losses[0].total + losses[1].total) / 2).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    both = model.backward([one, other], 3)
    torch.testing.assert_close(both.total, (losses[0].total + losses[1].total).detach() / 2)
    for name in model.components:
        torch.testing.assert_close(
            both.components[name], (losses[0].components[name] + losses[1].components[name]).detach() / 2
        )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_step_leaves_nothing_to_the_garbage_collector(batches, monkeypatch):
    model, _ = build(2)
    kept = []
    streams = model.item_streams

    def watched(t):
        found = streams(t)
        kept.extend(weakref.ref(x) for x in found)
        return found

    monkeypatch.setattr(model, "item_streams", watched)
    gc.disable()
    try:
        model.backward([batch()] * batches, 3)
        assert len(kept) == 2 and all(ref() is None for ref in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("fusion", ["bezier", "mean"])
def test_the_curve_of_fused_points_is_their_mean_cosine(fusion):
    model, _ = build(2, fusion=fusion)
    fused = model.embed().fused
    fused = fused / fused.norm(dim=1, keepdim=True)
    cosines = fused @ fused.T
    expected = (float(cosines.sum()) - ITEMS) / (ITEMS * (ITEMS - 1))
    assert model.curves()["fused_cosine"] == pytest.approx(expected, abs=1e-9)
    assert model.curves(model.embed()) == model.curves()
    with torch.no_grad():
        for modality in model.modalities:
            modality.point.weight.zero_()
    assert model.curves()["fused_cosine"] == pytest.approx(1)


def test_bfloat16_products_are_near_those_of_float32():
    model, _ = build(2)
    model = model.float()
    t = torch.full((ITEMS,), 0.3)
    exact = model(t)
    for modality in model.modalities:
        modality.features = modality.features.bfloat16()
    rough = model(t)
    assert rough.items.dtype == torch.float32
    difference = float(((rough.items - exact.items).norm() / exact.items.norm()).detach())
    assert 0 < difference < 0.02
    rough.items.sum().backward()
    assert all(m.hidden.weight.grad.dtype == torch.float32 and m.hidden.weight.grad.any() for m in model.modalities)


def test_components_add_up_to_the_loss():
    model, _ = build(2, gamma=0.7)
    loss = model.loss(model(torch.full((ITEMS,), 0.3, dtype=torch.float64)), batch())
    align, *uniformities = (loss.components[name] for name in model.components)
    torch.testing.assert_close(loss.total, align + 0.7 * sum(uniformities) / 2)


def test_embedding_for_evaluation_uses_the_middle_of_the_curve():
    model, _ = build(3)
    middle = model(torch.full((ITEMS,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(model.double().embed().items, middle.items, rtol=0, atol=0)
    assert not torch.equal(model(torch.full((ITEMS,), 0.1, dtype=torch.float64)).items, middle.items)


def test_detaching_the_similarity_changes_the_gradient_and_not_the_loss():
    results = {}
    for detach in (True, False):
        model, _ = build(2, detach_similarity=detach)
        loss = model.loss(model(torch.full((ITEMS,), 0.4, dtype=torch.float64)), batch())
        results[detach] = (loss.total, torch.autograd.grad(loss.total, model.modalities[0].point.weight)[0])
    assert torch.equal(results[True][0], results[False][0])
    assert not torch.allclose(results[True][1], results[False][1])


def test_tf32_is_allowed_for_products_with_features_alone():
    class Flags(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if "mm" in func.overloadpacket.__name__:
                wide = any(11 in x.shape for x in args if isinstance(x, torch.Tensor))
                seen.setdefault(wide, set()).add(torch.backends.cuda.matmul.allow_tf32)
            return found

    rng, seen = np.random.default_rng(0), {}
    interactions, graph = (sp.csr_matrix(rng.random(shape) < 0.3, dtype=np.float32) for shape in ((9, 7), (7, 7)))
    features = [rng.standard_normal((7, 11)).astype(np.float32) for _ in range(2)]
    model = build_model(features, interactions, graph, Model(embedding_dim=4), 0, "tf32")
    with Flags():
        embeddings = model.training_embeddings(0)
        (embeddings.items.square().sum() + embeddings.users.square().sum()).backward()
    assert seen == {True: {True}, False: {False}}
    strict = build_model(features, interactions, graph, Model(embedding_dim=4), 0)
    embeddings = strict.training_embeddings(0)
    (embeddings.items.square().sum() + embeddings.users.square().sum()).backward()
    for a, b in zip(model.parameters(), strict.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_embeddings_of_a_step_are_released_before_their_gradients_are_computed():
    """Of several losses; so are the gradients in them, as soon as they are read."""

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append(held() is not None)
            return grad

    def embeddings():
        made = Embeddings(Watched.apply(leaf) * 2, torch.zeros(2, 3))
        nonlocal held
        held = weakref.ref(made.users)
        return made

    alive, held, leaf = [], None, torch.ones(2, 3, requires_grad=True)
    backward(embeddings(), [partial(lambda power, found: Loss((found.users**power).sum(), {}), p) for p in (1, 2)])
    assert alive == [False] and torch.equal(leaf.grad, torch.full((2, 3), 5.0))


def test_gradients_of_bfloat16_features_in_blocks_of_items(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(50, 12, generator=generator).bfloat16()
    incoming = torch.randn(50, 7, generator=generator)

    def gradients(product):
        weight = torch.linspace(-1, 1, 84).view(7, 12).requires_grad_()
        bias = torch.linspace(0, 1, 7).requires_grad_()
        output = product(x, weight, bias)
        output.backward(incoming)
        return output.detach(), weight.grad, bias.grad

    def plain(x, weight, bias):
        return functional.linear(x, weight.bfloat16()).to(weight.dtype) + bias

    whole = gradients(_BFloat16Linear.apply)
    torch.testing.assert_close(whole, gradients(plain), rtol=0, atol=0)
    monkeypatch.setattr("cm3.model.model.BACKWARD_ROWS", 8)
    blocked = gradients(_BFloat16Linear.apply)
    torch.testing.assert_close(blocked, whole, rtol=0.02, atol=0.02)
    assert not torch.equal(blocked[1], whole[1])
