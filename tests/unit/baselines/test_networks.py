"""The networks' scores and losses against dense recomputations in float64."""

import math
from types import SimpleNamespace

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from dense_networks import (
    ITEMS,
    OTHERS,
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

from cm3.baselines.bm3 import BM3
from cm3.baselines.bpr_mf import BPRMF
from cm3.baselines.directau import DirectAU
from cm3.baselines.freedom import FREEDOM
from cm3.baselines.lightgcn import LightGCN
from cm3.baselines.mgcn import MGCN
from cm3.baselines.networks.freedom import prune
from cm3.baselines.vbpr import VBPR
from cm3.model.graph import SparseMatrix


def test_bpr_mf():
    network, p = made(BPRMF(embedding_dim=D, reg_weight=0.3))
    found = network.embed()
    same(found.users, p["users"], 0)
    same(found.items, p["items"], 0)
    expected = bpr(p["users"], p["items"]) + 0.3 * half_squares(p["users"], p["items"])
    loss = network.loss(network.training_embeddings(0), batch())
    same(loss.total, expected, 1e-12)
    same(loss.components["ranking"], bpr(p["users"], p["items"]), 1e-12)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_lightgcn(layers):
    network, p = made(LightGCN(embedding_dim=D, n_layers=layers, reg_weight=0.3))
    users, items = layered(p, layers)
    found = network.embed()
    same(found.users, users)
    same(found.items, items)
    loss = network.loss(network.training_embeddings(0), batch())
    same(loss.total, bpr(users, items) + 0.3 * half_squares(p["users"], p["items"]))


@pytest.mark.parametrize("layers", [0, 2])
def test_directau(layers):
    network, p = made(DirectAU(embedding_dim=D, n_layers=layers, gamma=0.7))
    users, items = layered(p, layers)
    same(network.embed().users @ network.embed().items.T, users @ items.T)
    u, i = oracle.unit_rows(users[PAIRS[0]]), oracle.unit_rows(items[PAIRS[1]])
    uniform = (oracle.log_mean_potential(u) + oracle.log_mean_potential(i)) / 2
    loss = network.loss(network.training_embeddings(0), batch())
    same(loss.total, np.mean([(a - b) @ (a - b) for a, b in zip(u, i, strict=True)]) + 0.7 * uniform)


def test_vbpr():
    network, p = made(VBPR(embedding_dim=D, reg_weight=0.3))
    x = np.concatenate(list(inputs().features.values()), axis=1).astype(float)
    score = np.zeros((USERS, ITEMS))
    for u in range(USERS):
        free, visual = p["users"][u, :D], p["users"][u, D:]
        for i in range(ITEMS):
            content = p["content"] @ x[i]
            score[u, i] = p["biases"][i, 0] + free @ p["items"][i] + visual @ content[:D] + content[D]
    found = network.embed()
    same(found.users @ found.items.T, score, 1e-12)
    pairs = list(zip(*PAIRS, OTHERS, strict=True))
    ranking = np.mean([-math.log(sigmoid(score[u, i] - score[u, j])) for u, i, j in pairs])
    contents = x @ p["content"].T
    whole = np.concatenate([p["items"], contents[:, :D], p["biases"] + contents[:, D:]], 1)
    squares = [p["users"][u] @ p["users"][u] + sum(whole[k] @ whole[k] for k in (i, j)) for u, i, j in pairs]
    same(network.loss(network.training_embeddings(0), batch()).total, ranking + 0.3 * np.mean(squares) / 2, 1e-12)


def test_bm3():
    network, p = made(BM3(embedding_dim=D, n_layers=2, dropout=0.25, cl_weight=2.0, reg_weight=0.3))
    users, items = layered(p, 2)
    items = items + p["items"]
    online_users, online_items = (linear(p, "predictor", h) for h in (users, items))
    found = network.embed()
    same(found.users, online_users)
    same(found.items, online_items)

    step = network.training_embeddings(11)
    target_users, target_items = step.target_users.numpy(), step.target_items.numpy()
    for target, h in ((target_users, users), (target_items, items)):
        assert ((target == 0) | np.isclose(target, h / 0.75, rtol=1e-5)).all() and (target == 0).any()

    def far(x: np.ndarray, y: np.ndarray) -> float:
        return 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y))

    terms = []
    for u, i in zip(*PAIRS, strict=True):
        term = far(online_users[u], target_items[i]) + far(online_items[i], target_users[u])
        for m in range(2):
            online = linear(p, "predictor", projected(p, m))[i]
            term += 2.0 * (far(online, target_items[i]) + far(online, step.target_contents[m].numpy()[i]))
        terms.append(term)
    size = (math.sqrt((users**2).sum()) + math.sqrt((items**2).sum())) / ITEMS
    same(network.loss(step, batch()).total, np.mean(terms) + 0.3 * size)
    assert not step.target_items.requires_grad
    again, other = network.training_embeddings(11), network.training_embeddings(12)
    assert torch.equal(again.target_users, step.target_users) and not torch.equal(other.target_users, step.target_users)


@pytest.mark.parametrize("n_mm_layers", [0, 1, 2])
def test_freedom(n_mm_layers):
    chosen = FREEDOM(embedding_dim=D, n_ui_layers=2, n_mm_layers=n_mm_layers, knn_k=3, reg_weight=0.3, dropout=0.4)
    network, p = made(chosen)
    near = np.zeros((ITEMS, ITEMS))
    for weight, (at, others, _) in zip((0.9, 0.1), inputs().neighbours.values(), strict=True):
        np.add.at(near, (at, others), weight / 3)
    similar = np.linalg.matrix_power(near, n_mm_layers) @ p["items"]

    users, items = layered(p, 2)
    found = network.embed()
    same(found.users, users)
    same(found.items, items + similar)

    network.begin_epoch(5)
    kept = prune(inputs().interactions, 0.4, 5).toarray()
    users, items = layered(p, 2, kept)
    step = network.training_embeddings(0)
    same(step.users, users)
    same(step.items, items + similar)
    contents = sum(bpr(users, projected(p, m)) for m in range(2))
    same(network.loss(step, batch()).total, bpr(users, items + similar) + 0.3 * contents)
    same(network.embed().users, layered(p, 2)[0])


def test_freedom_keeps_an_exact_share_of_edges_anew_by_seed():
    x = inputs().interactions
    kept = [prune(x, 0.8, seed) for seed in (1, 1, 2)]
    assert all(k.nnz == int(x.nnz * (1 - 0.8)) and (k - k.multiply(x)).nnz == 0 for k in kept)
    assert (kept[0] != kept[1]).nnz == 0 and (kept[0] != kept[2]).nnz > 0


def test_freedom_keeps_edges_of_rare_nodes_more_often():
    """Kept edges against successive draws without replacement, each proportional to 1 / sqrt(deg(u) deg(i))."""
    x = interactions()
    edges = np.argwhere(x)
    degrees = x.sum(1)[edges[:, 0]] * x.sum(0)[edges[:, 1]]
    rate = 1 / np.sqrt(degrees)
    rng, rounds = np.random.default_rng(0), 4000
    n_kept = int(len(edges) * (1 - 0.6))
    drawn, expected = np.zeros((USERS, ITEMS)), np.zeros((USERS, ITEMS))
    for seed in range(rounds):
        drawn += prune(inputs().interactions, 0.6, seed).toarray()
        left = list(range(len(edges)))
        for _ in range(n_kept):
            at = int(rng.choice(len(left), p=rate[left] / rate[left].sum()))
            expected[tuple(edges[left.pop(at)])] += 1
    assert rate.max() > 2 * rate.min()
    # Five standard deviations of the difference of two shares of 4000 draws.
    np.testing.assert_allclose(drawn / rounds, expected / rounds, rtol=0, atol=5 * math.sqrt(0.5 / rounds))


@pytest.mark.parametrize("n_mm_layers", [1, 2])
def test_mgcn(n_mm_layers):
    chosen = MGCN(
        embedding_dim=D, n_ui_layers=2, n_mm_layers=n_mm_layers, knn_k=3, cl_weight=0.5, reg_weight=0.3, temperature=0.2
    )
    network, p = made(chosen)
    behaviour = np.concatenate(layered(p, 2))
    a = oracle.dense_adjacency(interactions())
    views, graphs = [], []
    for m, (at, others, cosines) in enumerate(inputs().neighbours.values()):
        near = np.zeros((ITEMS, ITEMS))
        near[at, others] = np.maximum(cosines, 0)
        graphs.append(near / np.sqrt(np.outer(near.sum(1), near.sum(1))))
        pure = p["items"] * sigmoid(linear(p, f"purifiers.{m}", projected(p, m)))
        items = np.linalg.matrix_power(graphs[m], n_mm_layers) @ pure
        views.append(np.concatenate([a[:USERS, USERS:] @ items, items]))
    content = np.zeros_like(behaviour)
    for node in range(USERS + ITEMS):
        logits = [p["attention.2.weight"][0] @ np.tanh(linear(p, "attention.0", view[node])) for view in views]
        share = np.exp(logits) / np.exp(logits).sum()
        shared = sum(s * view[node] for s, view in zip(share, views, strict=True))
        own = [
            sigmoid(linear(p, f"preferences.{m}", behaviour[node])) * (views[m][node] - shared)
            for m in range(len(views))
        ]
        content[node] = (shared + sum(own)) / 3
    final = behaviour + content
    found = network.embed()
    same(found.users, final[:USERS])
    same(found.items, final[USERS:])

    def contrast(nodes: list[int]) -> float:
        x, y = oracle.unit_rows(content[nodes]), oracle.unit_rows(behaviour[nodes])
        terms = [
            -math.log(math.exp(x[b] @ y[b] / 0.2) / sum(math.exp(x[b] @ other / 0.2) for other in y))
            for b in range(len(nodes))
        ]
        return float(np.mean(terms))

    users, items = final[:USERS], final[USERS:]
    expected = bpr(users, items) + 0.3 * half_squares(users, items)
    expected += 0.5 * (contrast(PAIRS[0]) + contrast([USERS + i for i in PAIRS[1]]))
    same(network.loss(network.training_embeddings(0), batch()).total, expected)


@pytest.mark.parametrize(
    "settings",
    [
        LightGCN(embedding_dim=D),
        DirectAU(embedding_dim=D, n_layers=1),
        BM3(embedding_dim=D, dropout=0.0),
        FREEDOM(embedding_dim=D, n_mm_layers=2, train_features=True),
        MGCN(embedding_dim=D, n_mm_layers=2, train_features=True),
    ],
)
def test_gradients_are_those_of_finite_differences(settings):
    """The products with constant graphs have gradients of their own."""
    network, _ = made(settings)
    for part in network.modules():
        if isinstance(part, SparseMatrix):
            part.values = part.values.double()
    # A target is a constant to BM3's gradient: it is held at what it is before the step.
    held = network.training_embeddings(4)

    def loss() -> torch.Tensor:
        step = network.training_embeddings(4)
        if isinstance(settings, BM3):
            names = ("target_users", "target_items", "target_contents")
            step = SimpleNamespace(**vars(step) | {name: getattr(held, name) for name in names})
        return network.loss(step, batch()).total

    loss().backward()
    assert {name for name, p in network.named_parameters() if p.grad is None} == set()
    rng = np.random.default_rng(0)
    for name, parameter in network.named_parameters():
        direction = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        slope = float((above - below) / 2e-5)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_features_are_parameters_only_where_that_is_wanted():
    for cls in (BM3, FREEDOM, MGCN):
        for trained in (False, True):
            network = cls(embedding_dim=D, train_features=trained).network(inputs())
            names = {name for name, _ in network.named_parameters()}
            assert ("modalities.0.features" in names) is trained
            assert torch.equal(network.modalities[1].features, torch.from_numpy(inputs().features["image"]))
