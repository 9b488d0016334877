"""The tiled kernel of uniformity against the plain formulas: values and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.model.losses import calibrated_uniformity, uniformity
from cm3.model.pair_potential import tiled_calibrated_uniformity, tiled_uniformity

CLAMP = (0.0, 0.9)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


class OneOfTwo:
    """A process that owns some of the blocks; the other one's sums are given to it."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.other: OneOfTwo | None = None
        self.peak = self.total = torch.zeros(())

    def owns(self, block: int) -> bool:
        return block % 2 == self.rank

    def merge(self, peak: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.peak, self.total = peak, total.clone()
        if self.other is None:
            return peak, total
        highest = torch.maximum(peak, self.other.peak)
        return highest, total * (peak - highest).exp() + self.other.total * (self.other.peak - highest).exp()


def draw(seed: int, n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, points and counts; some rows are equal, some far apart."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * rng.choice([0.3, 1.0, 3.0])
    x[rng.random(n) < 0.2] = x[0] if n else 0
    points = rng.standard_normal((n, d + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    both = (torch.from_numpy(values).to(dtype).requires_grad_() for values in (x, points))
    return *both, torch.from_numpy(rng.integers(1, 5, n))


def same(found: torch.Tensor, expected: torch.Tensor, terms: float = 1.0) -> None:
    """Equal up to rounding of the largest entry, or of `terms`, the largest value that it is computed from."""
    if expected.numel():
        scale = max(terms, float(expected.detach().abs().max()))
        assert float((found - expected).detach().abs().max()) <= TOLERANCE[expected.dtype] * scale


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 70),
    d=st.integers(1, 9),
    t=st.sampled_from([0.5, 2.0]),
    counted=st.booleans(),
    block_rows=st.sampled_from([None, 1, 3, 16, 100]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_kernel_equals_formula(seed, n, d, t, counted, block_rows, dtype):
    x, points, counts = draw(seed, n, d, dtype)
    counts = counts if counted else None
    exponents = max(1.0, 2 * t * float(x.detach().square().sum(1).max())) if n else 1.0
    found = tiled_uniformity(x, t, counts, block_rows=block_rows)
    expected = uniformity(x, t, counts)
    same(found, expected, exponents)
    same(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0])

    found = tiled_calibrated_uniformity(x, points, CLAMP, t, counts, block_rows=block_rows)
    expected = calibrated_uniformity(x, (points @ points.T).clamp(*CLAMP), t, counts)
    same(found, expected, exponents)
    plain = torch.autograd.grad(expected, (x, points))
    for gradient, other in zip(torch.autograd.grad(found, (x, points)), plain, strict=True):
        same(gradient, other)


@pytest.mark.parametrize("n", [300, 700])
def test_default_blocks(n):
    x, points, counts = draw(1, n, 8, torch.float64)
    same(tiled_uniformity(x), uniformity(x))
    plain = calibrated_uniformity(x, (points @ points.T).clamp(*CLAMP), counts=counts)
    same(tiled_calibrated_uniformity(x, points, CLAMP, counts=counts), plain)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), n=st.integers(2, 60), block_rows=st.sampled_from([None, 1, 7]))
def test_gradients_of_two_processes_add_up(seed, n, block_rows):
    x, points, counts = draw(seed, n, 5, torch.float64)
    ranks = [OneOfTwo(0), OneOfTwo(1)]
    for rank in ranks:
        tiled_calibrated_uniformity(x, points, CLAMP, 2.0, counts, rank, block_rows)
    ranks[0].other, ranks[1].other = OneOfTwo(1), OneOfTwo(0)
    for rank, other in zip(ranks, ranks[::-1], strict=True):
        rank.other.peak, rank.other.total = other.peak, other.total
    values = [tiled_calibrated_uniformity(x, points, CLAMP, 2.0, counts, rank, block_rows) for rank in ranks]
    whole = tiled_calibrated_uniformity(x, points, CLAMP, 2.0, counts)
    for value in values:
        same(value, whole)
    parts = [torch.autograd.grad(value, (x, points)) for value in values]
    for *some, expected in zip(*parts, torch.autograd.grad(whole, (x, points)), strict=True):
        same(sum(some), expected)


@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_gives_zero_and_no_gradient(n):
    x = torch.ones(n, 3, dtype=torch.float64, requires_grad=True)
    value = tiled_uniformity(x, counts=torch.full((n,), 3))
    value.backward()
    assert float(value.detach()) == 0 and x.grad is not None and not x.grad.any()


def test_far_apart_rows_do_not_underflow():
    x = torch.tensor([[0.0], [100.0], [250.0]])
    assert float(tiled_uniformity(x)) == pytest.approx(-20000 - np.log(3), rel=1e-6)


def test_only_wanted_gradients_are_computed():
    x, points, _ = draw(2, 20, 4, torch.float64)
    for wanted, constant in ((x, points), (points, x)):
        value = tiled_calibrated_uniformity(*(v if v is wanted else v.detach() for v in (x, points)), CLAMP)
        value.backward()
        assert wanted.grad is not None and constant.grad is None
        wanted.grad = None
