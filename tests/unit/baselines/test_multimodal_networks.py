"""MMGCF, LIRDRec and SMORE against dense recomputations in float64."""

import math

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from dense_networks import (
    ITEMS,
    PAIRS,
    USERS,
    D,
    batch,
    bpr,
    half_squares,
    inputs,
    interactions,
    layered,
    linear,
    made,
    projected,
    same,
    sigmoid,
)
from training_shop import one_thread  # noqa: F401

from cm3.baselines.inputs import Inputs
from cm3.baselines.lirdrec import LIRDRec
from cm3.baselines.mmgcf import MMGCF
from cm3.baselines.networks.freedom import prune
from cm3.baselines.networks.lirdrec import computed_share, transformed
from cm3.baselines.smore import SMORE
from cm3.model.graph import SparseMatrix


def fused(p, fusion: str, parts: list[np.ndarray], layer: str = "joint") -> np.ndarray:
    if fusion == "concat":
        return linear(p, layer, np.concatenate(parts, 1))
    return sum(parts) / (len(parts) if fusion == "mean" else 1)


@pytest.mark.parametrize("weighting", ["equal", "alpha", "normalized"])
@pytest.mark.parametrize("fusion", ["mean", "sum", "concat"])
def test_mmgcf(fusion, weighting):
    network, p = made(
        MMGCF(embedding_dim=D, n_ui_layers=2, reg_weight=0.3, dropout=0.4, fusion=fusion, weighting=weighting)
    )

    def expected(kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        users, items = layered(p, 2, kept)
        contents = [projected(p, m) for m in range(2)]
        if weighting == "equal":
            return users, fused(p, fusion, [items, fused(p, fusion, contents, "modal")])
        if weighting == "alpha":
            a = sigmoid(p["gate"])
            return users, fused(p, fusion, [a * items, *((1 - a) * h for h in contents)])
        return users, fused(p, fusion, [2 * oracle.unit_rows(items), *map(oracle.unit_rows, contents)])

    users, items = expected()
    found = network.embed()
    same(found.users, users)
    same(found.items, items)

    network.begin_epoch(5)
    users, items = expected(prune(inputs().interactions, 0.4, 5).toarray())
    step = network.training_embeddings(0)
    same(step.items, items)
    same(network.loss(step, batch()).total, bpr(users, items) + 0.3 * half_squares(p["users"], p["items"]))
    same(network.embed().users, layered(p, 2)[0])


def lirdrec(epoch: int, n_mm_layers: int = 2, **changes):
    network, p = made(LIRDRec(embedding_dim=D, n_ui_layers=2, n_mm_layers=n_mm_layers, knn_k=3, **changes))
    with torch.no_grad():
        network.progress.copy_(torch.tensor([epoch, 0]))
    return network, p


def lirdrec_weights(p, users: np.ndarray, w: float) -> np.ndarray:
    """Softmax of w f + (1 - w) theta, user by user; `users` are the three parts side by side."""
    found = np.zeros((USERS, 3))
    for u in range(USERS):
        for m in range(3):
            inner = linear(p, f"attention.{m}.0", users[u, m * D : (m + 1) * D])
            computed = linear(p, f"attention.{m}.2", np.where(inner > 0, inner, 0.01 * inner))[0]
            found[u, m] = math.exp(w * computed + (1 - w) * p["theta"][u, m])
    return found / found.sum(1, keepdims=True)


def lirdrec_nodes(p) -> np.ndarray:
    parts = []
    features = {m: x.astype(float) for m, x in inputs().features.items()}
    for m, x in enumerate((*features.values(), np.concatenate([dct(x) for x in features.values()], 1))):
        inner = linear(p, f"encoders.{m}.inner", x)
        items = np.where(inner > 0, inner, 0.01 * inner) @ p[f"encoders.{m}.outer.weight"].T
        parts.append(oracle.unit_rows(np.concatenate([p[f"users.{m}"], items])))
    nodes, a = np.concatenate(parts, 1), oracle.dense_adjacency(interactions())
    return nodes + a @ nodes + a @ a @ nodes


def dct(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    k, j = np.arange(n)[:, None], np.arange(n)
    basis = np.sqrt(2 / n) * np.cos(np.pi * (2 * j + 1) * k / (2 * n))
    basis[0] /= np.sqrt(2)
    return x @ basis.T


@pytest.mark.parametrize("n_mm_layers", [0, 2])
def test_lirdrec(n_mm_layers):
    network, p = lirdrec(3, n_mm_layers, reg_weight=0.3, copy_start=0.8, copy_decay=0.7)
    nodes = lirdrec_nodes(p)
    ratio = 0.8 / 0.2 * 0.7 * 0.7**2 * 0.7**3
    weights = lirdrec_weights(p, nodes[:USERS], ratio / (1 + ratio))
    users = nodes[:USERS] * np.repeat(weights, D, axis=1)
    near = np.zeros((ITEMS, ITEMS))
    for weight, (at, others, _) in zip((0.9, 0.1), inputs().neighbours.values(), strict=True):
        np.add.at(near, (at, others), weight / 3)
    items = nodes[USERS:] + np.linalg.matrix_power(near, n_mm_layers) @ nodes[USERS:]
    found = network.embed()
    same(found.users, users)
    same(found.items, items)
    expected = bpr(users, items) + 0.3 * ((users**2).mean() + (items**2).mean())
    same(network.loss(network.training_embeddings(0), batch()).total, expected)


def test_lirdrec_copies_the_weights_once_in_each_epoch_after_the_first():
    network, p = lirdrec(0)
    before = p["theta"].copy()
    network.begin_epoch(2**40 + 1)
    same(network.theta, before, 0)
    assert network.progress.tolist() == [1, 1]
    expected = lirdrec_weights(p, lirdrec_nodes(p)[:USERS], computed_share(network.settings, 1))
    network.begin_epoch(2**40 + 2)
    same(network.theta, expected)
    assert network.progress.tolist() == [2, 2]
    with torch.no_grad():
        network.theta += 1
    network.begin_epoch(2**40 + 2)  # as a resumed run does
    same(network.theta, expected + 1)
    assert network.progress.tolist() == [2, 2]


def test_lirdrec_moves_from_computed_to_copied_weights():
    shares = [computed_share(LIRDRec(), epoch) for epoch in range(12)]
    assert shares[0] == pytest.approx(0.9) and shares[1] == pytest.approx(0.81 / 0.91)
    assert (np.diff(shares) < 0).all() and shares[11] < 0.01


def test_the_cosine_transform_is_that_of_each_modality():
    features = inputs().features
    found = transformed(features)
    np.testing.assert_allclose(found, np.concatenate([dct(x) for x in features.values()], 1), rtol=0, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("n_mm_layers", [0, 2])
def test_smore(n_mm_layers):
    chosen = SMORE(
        embedding_dim=D, n_ui_layers=2, n_mm_layers=n_mm_layers, knn_k=3, cl_weight=0.5, reg_weight=0.3, dropout=0.25
    )
    network, p = made(chosen)
    behaviour = np.concatenate(layered(p, 2))
    a = oracle.dense_adjacency(interactions())
    spectra = [np.fft.rfft(projected(p, m), norm="ortho") for m in range(2)]
    filters = p["filters"][..., 0] + 1j * p["filters"][..., 1]
    graphs = []
    for at, others, cosines in inputs().neighbours.values():
        near = np.zeros((ITEMS, ITEMS))
        near[at, others] = np.maximum(cosines, 0)
        graphs.append(near / np.sqrt(np.outer(near.sum(1), near.sum(1))))
    graphs.append(np.maximum(*graphs))
    views = []
    for m, spectrum in enumerate((*spectra, spectra[0] * spectra[1])):
        pure = p["items"] * sigmoid(linear(p, f"purifiers.{m}", np.fft.irfft(spectrum * filters[m], D, norm="ortho")))
        items = np.linalg.matrix_power(graphs[m], n_mm_layers) @ pure
        views.append(np.concatenate([a[:USERS, USERS:] @ items, items]))
    for m in range(2):
        hidden = np.tanh(linear(p, f"attention.{m}.0", views[2]))
        share = np.exp(hidden @ p[f"attention.{m}.2.weight"].T)
        views[m] = views[m] * share / share.sum(1, keepdims=True)
    content = sum(sigmoid(linear(p, f"preferences.{m}", behaviour)) * view for m, view in enumerate(views)) / 3
    found = network.embed()
    same(found.users, (behaviour + content)[:USERS])
    same(found.items, (behaviour + content)[USERS:])

    def contrast(nodes: list[int]) -> float:
        x, y = oracle.unit_rows(content[nodes]), oracle.unit_rows(behaviour[nodes])
        cosines = np.exp(x @ y.T / 0.2)
        return float(np.mean(-np.log(np.diag(cosines) / cosines.sum(1))))

    users, items = (behaviour + content)[:USERS], (behaviour + content)[USERS:]
    expected = bpr(users, items) + 0.3 * half_squares(users, items)
    expected += 0.5 * (contrast(PAIRS[0]) + contrast([USERS + i for i in PAIRS[1]]))
    same(network.loss(found, batch()).total, expected)


def test_smore_drops_entries_of_its_gates_by_seed():
    network, _ = made(SMORE(embedding_dim=D, knn_k=3, dropout=0.5))
    first, again, other = (network.training_embeddings(seed).content for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    mean = torch.stack([network.training_embeddings(seed).content for seed in range(4000)]).mean(0)
    spread = network.embed().content.abs().max().item()
    np.testing.assert_allclose(
        mean.detach().numpy(), network.embed().content.numpy(), rtol=0, atol=6 * spread / math.sqrt(4000)
    )


@pytest.mark.parametrize(
    "settings",
    [
        MMGCF(embedding_dim=D, fusion="concat", dropout=0.3),
        MMGCF(embedding_dim=D, weighting="alpha"),
        LIRDRec(embedding_dim=D, n_mm_layers=2),
        SMORE(embedding_dim=D, n_mm_layers=2, train_features=True),
    ],
)
def test_gradients_are_those_of_finite_differences(settings):
    network, _ = made(settings)
    for part in network.modules():
        if isinstance(part, SparseMatrix):
            part.values = part.values.double()
    if isinstance(settings, LIRDRec):
        with torch.no_grad():
            network.progress.copy_(torch.tensor([2, 0]))

    def loss() -> torch.Tensor:
        return network.loss(network.training_embeddings(4), batch()).total

    loss().backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in trained.items() if parameter.grad is None} == set()
    rng = np.random.default_rng(0)
    for name, parameter in trained.items():
        direction = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        slope = float((above - below) / 2e-5)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kept", [("text",), ("text", "image", "sound")])
@pytest.mark.parametrize("spec", [MMGCF, LIRDRec, SMORE])
def test_any_number_of_modalities(spec, kept):
    whole = inputs()
    sources = {"text": "text", "image": "image", "sound": "text"}
    features, neighbours = ({m: table[sources[m]] for m in kept} for table in (whole.features, whole.neighbours))
    given = Inputs(whole.interactions, features, neighbours, {m: 1 / len(kept) for m in kept})
    network = spec(embedding_dim=D).network(given)
    network.begin_epoch(1)
    step = network.training_embeddings(0)
    assert step.users.shape[1] == step.items.shape[1]
    assert torch.isfinite(network.loss(step, batch()).total)
    assert torch.isfinite(network.embed().items).all()
