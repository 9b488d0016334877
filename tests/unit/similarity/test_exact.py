"""Exact nearest neighbours against brute force in extended precision, to the bit."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT

import cm3.similarity.exact as neighbours
from cm3.similarity.exact import UnitRows, knn


def brute_force(x: np.ndarray, k: int, include_self: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Sort all cosines, computed in extended precision and rounded as the scores are."""
    wide = x.astype(np.longdouble)
    length = np.sqrt((wide * wide).sum(1))
    unit = wide / np.where(length > 0, length, 1)[:, None]
    cosine = unit @ unit.T
    cosine = np.round(cosine * 2**44).astype(np.float64) / 2**44 if x.dtype == np.float64 else cosine.astype(np.float32)
    masked = cosine.copy()
    if not include_self:
        np.fill_diagonal(masked, -np.inf)
    order = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosine, order, 1)


def check(x: np.ndarray, k: int, include_self: bool = True, device: str = "cpu") -> None:
    before = x.copy()
    indices, scores = (found.cpu() for found in knn(torch.from_numpy(x).to(device), k, include_self))
    expected, cosine = brute_force(x, k, include_self)
    if x.dtype == np.float32:
        np.testing.assert_array_equal(scores.numpy(), cosine)
        np.testing.assert_array_equal(indices.numpy(), expected)
    else:
        # The grid of float64 scores is so fine that one of hundreds rounds to the other side than brute force's.
        np.testing.assert_allclose(scores.numpy(), cosine, rtol=0, atol=2**-44)
        alike = (scores.numpy() == cosine).all(1)
        np.testing.assert_array_equal(indices.numpy()[alike], expected[alike])
        assert alike.mean() > 0.5 or len(x) < 60
        among = brute_force(x, len(x) - (not include_self), include_self)
        listed = np.full((len(x), len(x)), -2.0)
        np.put_along_axis(listed, among[0], among[1], 1)
        np.testing.assert_allclose(np.take_along_axis(listed, indices.numpy(), 1), scores.numpy(), rtol=0, atol=2**-44)
    np.testing.assert_array_equal(x, before)
    assert scores.numpy().dtype == x.dtype and indices.dtype == torch.int64


def drawn(case: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 24)).astype(np.float32)
    if case == "repeated":  # more equal rows than there are candidates, scattered
        x[rng.permutation(400)[:150]] = x[5]
    elif case == "noise":  # differ in the last bits: all cosines round to 1
        x[100:300] = x[7] * (1 + rng.integers(-1, 2, (200, 24)).astype(np.float32) * np.float32(2**-23))
    elif case == "near":  # closer than bfloat16 and TF32 can tell
        x[100:300] = x[7] + rng.standard_normal((200, 24)).astype(np.float32) * 1e-3
    elif case == "zeros":
        x[rng.permutation(400)[:60]] = 0
    elif case == "constant":
        x[:] = 0.3
    elif case == "signs":
        x = np.sign(x)
    elif case == "scales":  # from the denormal numbers to the largest
        x *= np.float32(10.0) ** rng.integers(-37, 37, (400, 1)).astype(np.float32)
    return x


CASES = ["random", "repeated", "noise", "near", "zeros", "constant", "signs", "scales"]


@pytest.fixture(params=[0, 13, 16], ids=["float32", "tf32", "bfloat16"])
def dropped_bits(request, monkeypatch):
    """Every device's rounding on this one."""
    monkeypatch.setattr(neighbours, "droppable_bits", lambda device: request.param)


@pytest.mark.parametrize("case", CASES)
def test_neighbours_and_scores_are_those_of_brute_force(case, dropped_bits, device):
    check(drawn(case), 10, device=device)


@pytest.mark.parametrize("case", ["repeated", "noise", "zeros"])
@pytest.mark.parametrize("k", [1, 399])
def test_without_the_row_itself(case, k, dropped_bits):
    check(drawn(case), k, include_self=False)


@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 1, 2), (60, 1, 7), (50, 5, 50), (90, 4096, 9)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_shapes(n, d, k, dtype, dropped_bits):
    check(np.random.default_rng(1).standard_normal((n, d)).astype(dtype), k)


@pytest.mark.parametrize("scale", [1.0, 1e-290, 1e300, 1e-310])
def test_float64_rows_of_any_length(scale, dropped_bits):
    x = np.random.default_rng(2).standard_normal((120, 7)) * scale
    x[40:80] = x[3]
    check(x, 6)


@pytest.mark.parametrize("case", CASES)
def test_blocks_groups_and_threads_change_nothing(case, dropped_bits, monkeypatch):
    x = torch.from_numpy(drawn(case))
    expected = knn(x, 6)
    for entries, columns, group, threads in [(3000, 50, 2, 1), (20_000, 130, 3, 2), (10**6, 399, 4, 2)]:
        monkeypatch.setattr(neighbours, "BLOCK_ENTRIES", entries)
        monkeypatch.setattr(neighbours, "CHUNK_COLUMNS", columns)
        monkeypatch.setattr("cm3.common.topk.GROUP", group)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = knn(x, 6)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 60),
    d=st.integers(1, 6),
    distinct=st.integers(1, 60),
    wide=st.booleans(),
    include_self=st.booleans(),
    bits=st.sampled_from([0, 13, 16]),
)
def test_any_small_matrix(seed, n, d, distinct, wide, include_self, bits):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((distinct, d)).astype(np.float64 if wide else np.float32)[rng.integers(0, distinct, n)]
    x[rng.random(n) < 0.1] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "droppable_bits", lambda device: bits)
        patch.setattr(neighbours, "MARGIN", int(rng.integers(0, 4)))
        check(x, int(rng.integers(1, n)), include_self)


def test_chosen_rows_get_what_they_get_among_all():
    x, rows = torch.from_numpy(drawn("repeated")), torch.tensor([399, 5, 5, 0])
    whole, some = knn(x, 4, include_self=False), knn(x, 4, include_self=False, rows=rows)
    assert all(torch.equal(a[rows], b) for a, b in zip(whole, some, strict=True))


def test_the_error_bounds_every_product():
    unit_rows = UnitRows(torch.from_numpy(drawn("random")))
    rows = torch.arange(400)
    exact = unit_rows.cosines(rows, rows.expand(400, -1))
    for bits, most in [(0, 1e-4), (13, 2e-3), (16, 1e-2)]:
        copies, error = unit_rows.quantised(bits)
        off = (copies.float() @ copies.float().T - exact).abs().max()
        assert (bits == 0 or error / 50 < off) and off < error < most


def test_a_device_whose_products_are_worse_than_promised_is_found_out(monkeypatch):
    def poor(*arguments):
        values, places = honest(*arguments)
        return values * 0.97, places.flip(0)

    honest = neighbours.candidates_of
    monkeypatch.setattr(neighbours, "candidates_of", poor)
    check(drawn("random"), 10)


def test_the_caller_s_precision_of_products_is_given_back():
    torch.set_float32_matmul_precision("high")
    try:
        knn(torch.from_numpy(drawn("random")), 3)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        knn(torch.tensor([[1.0, value], [1.0, 2.0]], dtype=dtype), 1)


@pytest.mark.integration
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_memory_stays_far_below_a_square_matrix(spread):
    """20,000 rows: a square of float32 is 1.6 GB. All rows equal take the path in float64, whose peak varies by 400 MB."""
    code = f"""
        import resource, torch
        from cm3.similarity.exact import knn
        x = torch.ones(20_000, 4) + {spread} * torch.randn(20_000, 4)
        knn(x[:2000], 10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        indices, scores = knn(x, 10)
        assert ({spread} > 0 or indices.tolist() == [list(range(10))] * 20_000) and (scores > 0.5).all()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1_000_000


@pytest.mark.parametrize(("spread", "passes"), [(1.0, {(16, 32)}), (0.3, {(16, 64)}), (0.01, {(0, 16)})])
def test_the_closer_neighbours_are_the_more_candidates_it_takes_until_reduced_products_are_left_out(
    spread, passes, monkeypatch
):
    monkeypatch.setattr(neighbours, "droppable_bits", lambda device: 16)
    monkeypatch.setattr(neighbours, "PILOT", 8)
    honest, searched = neighbours.scan, set()

    def scan(unit_rows, rows, k, among, bits, margin):
        if len(rows) == 800:
            searched.add((bits, margin))
        return honest(unit_rows, rows, k, among, bits, margin)

    monkeypatch.setattr(neighbours, "scan", scan)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator).repeat(200, 1) + spread * torch.randn(800, 64, generator=generator)
    indices, scores = neighbours.knn(x, 5)
    assert searched == passes
    monkeypatch.setattr(neighbours, "droppable_bits", lambda device: 0)
    assert torch.equal(indices, neighbours.knn(x, 5)[0]) and torch.equal(scores, neighbours.knn(x, 5)[1])
