"""Uniformity by bfloat16 products against the plain formulas: near in value and gradient, and of few shapes of products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cm3.model.bfloat16_pairs import ROW_MULTIPLE
from cm3.model.losses import calibrated_uniformity, uniformity
from cm3.model.pair_potential import tiled_calibrated_uniformity, tiled_uniformity

CLAMP = (0.0, 0.9)


def draw(seed: int, n: int, d: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows and points around a common one, and counts."""
    rng = np.random.default_rng(seed)
    drawn = (rng.standard_normal((1, k)) + spread * rng.standard_normal((n, k)) for k in (d, d + 1))
    x, points = (functional.normalize(torch.from_numpy(rows).float(), dim=1).requires_grad_() for rows in drawn)
    return x, points, torch.from_numpy(rng.integers(1, 5, n))


def near(found: torch.Tensor, expected: torch.Tensor, shares: torch.Tensor, t: float) -> None:
    """Equal up to rounding of the 2 t P_ab of each pair, whose sums by row are `shares`."""
    limit = 2.0**-6 * 2 * t * shares.max()
    assert float((found - expected).abs().max()) <= limit


def shares(x: torch.Tensor, t: float, counts: torch.Tensor, similarity: torch.Tensor | None = None) -> torch.Tensor:
    q = -t * (torch.cdist(x, x).square() - (2 - 2 * similarity if similarity is not None else 0))
    weights = (q.exp() * counts[:, None] * counts).fill_diagonal_(0)
    return weights.sum(1) / weights.sum() * 2


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    n=st.sampled_from([2, 3, 63, 64, 65, 150]),
    d=st.integers(2, 9),
    t=st.sampled_from([0.5, 2.0]),
    counted=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    block_rows=st.sampled_from([None, 1, 64, 100]),
)
def test_values_and_gradients_are_near_those_of_the_formula(seed, n, d, t, counted, spread, block_rows):
    x, points, counts = draw(seed, n, d, spread)
    if not counted:
        counts = torch.ones_like(counts)
    options = {"block_rows": block_rows, "bfloat16": True}
    found = tiled_uniformity(x, t, counts if counted else None, **options)
    expected = uniformity(x, t, counts)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=0.04 * t)
    with torch.no_grad():
        by_row = shares(x, t, counts)
    near(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0], by_row, t)

    found = tiled_calibrated_uniformity(x, points, (-1.0, 2.0), t, counts if counted else None, **options)
    similarity = points @ points.T
    expected = calibrated_uniformity(x, similarity, t, counts)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=0.08 * t)
    with torch.no_grad():
        by_row = shares(x, t, counts, similarity.detach())
    pairs = zip(
        torch.autograd.grad(found, (x, points)),
        torch.autograd.grad(expected, (x, points), retain_graph=True),
        strict=True,
    )
    for gradient, plain in pairs:
        near(gradient, plain, by_row, 2 * t)


def test_similarities_outside_the_clamp_have_no_gradient():
    x, points, counts = draw(3, 100, 6, 10.0)
    value = tiled_calibrated_uniformity(x, points, CLAMP, 2.0, counts, bfloat16=True)
    plain = calibrated_uniformity(x, (points @ points.T).clamp(*CLAMP), 2.0, counts)
    found, expected = (torch.autograd.grad(v, points)[0] for v in (value, plain))
    assert float(functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.999
    unclamped = tiled_calibrated_uniformity(x, points, (-1.0, 1.1), 2.0, counts, bfloat16=True)
    other = torch.autograd.grad(unclamped, points)[0]
    assert float(functional.cosine_similarity(other.flatten(), expected.flatten(), dim=0)) < 0.9


def test_rows_of_count_zero_add_nothing():
    x, points, counts = draw(1, 80, 5, 1.0)
    counts[50:] = 0
    whole = tiled_calibrated_uniformity(x, points, CLAMP, 2.0, counts, bfloat16=True)
    by_x, by_points = torch.autograd.grad(whole, (x, points))
    first = tiled_calibrated_uniformity(x[:50], points[:50], CLAMP, 2.0, counts[:50], bfloat16=True)
    assert float(whole.detach()) == pytest.approx(float(first.detach()), abs=1e-6)
    assert not by_x[50:].any() and not by_points[50:].any() and by_x[:50].any()


def test_large_counts_are_counted_in_integers():
    x = functional.normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    counts = torch.tensor([30_000_001, 1])
    found, expected = tiled_uniformity(x, counts=counts, bfloat16=True), tiled_uniformity(x, counts=counts)
    assert float(found) == pytest.approx(float(expected), abs=0.05) and float(expected) < -0.1


@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_gives_zero_and_no_gradient(n):
    x = torch.ones(n, 3, requires_grad=True)
    value = tiled_uniformity(x, counts=torch.full((n,), 3), bfloat16=True)
    value.backward()
    assert float(value.detach()) == 0 and x.grad is not None and not x.grad.any()


class OneOfTwo:
    """A process that owns some of the blocks; the other one's total is given to it."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank, self.own, self.other = rank, torch.zeros(()), torch.zeros(())

    def owns(self, block: int) -> bool:
        return block % 2 == self.rank

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        self.own = total
        return total + self.other


def test_gradients_of_two_processes_add_up():
    x, points, counts = draw(4, 150, 5, 1.0)
    given = (x, points, CLAMP, 2.0, counts)
    ranks = [OneOfTwo(0), OneOfTwo(1)]
    for rank in ranks:
        tiled_calibrated_uniformity(*given, rank, 64, bfloat16=True)
    ranks[0].other, ranks[1].other = ranks[1].own, ranks[0].own
    values = [tiled_calibrated_uniformity(*given, rank, 64, bfloat16=True) for rank in ranks]
    whole = tiled_calibrated_uniformity(*given, None, 64, bfloat16=True)
    parts = [torch.autograd.grad(value, (x, points)) for value in values]
    for value in values:
        torch.testing.assert_close(value, whole)
    for *some, expected in zip(*parts, torch.autograd.grad(whole, (x, points)), strict=True):
        torch.testing.assert_close(sum(some), expected)


class Shapes(TorchDispatchMode):
    """Collects the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.mm.default:
            self.found.add(tuple(x.shape for x in arguments))
        return function(*arguments, **(options or {}))


def test_batches_of_other_sizes_have_the_shapes_of_products_of_the_first():
    """A CPU compiles a product of each new shape, and the number of distinct items differs in each batch."""
    found = []
    for n in (ROW_MULTIPLE + 1, ROW_MULTIPLE + 17, 2 * ROW_MULTIPLE):
        x, points, counts = draw(0, n, 6, 1.0)
        with Shapes() as shapes:
            tiled_calibrated_uniformity(x, points, CLAMP, counts=counts, bfloat16=True)
        found.append(shapes.found)
    assert found[0] and found[0] == found[1] == found[2]
