"""Reduced features: their vectors, statuses and facts, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm3.common.errors import UserError
from cm3.common.features import read_features, write_features
from cm3.common.files import sha256_of
from cm3.common.pca import read_projection
from cm3.common.reduction import Reduction
from cm3.common.tables import FAILED, MISSING, OK
from extractors.reduce import reduce

N, D = 60, 16


def wide(folder: Path, dtype: str = "float32") -> Path:
    """60 items, every seventh missing and one failed, most variance in five directions."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((N, 5)) @ rng.standard_normal((5, D)) + 0.1 * rng.standard_normal((N, D)) + 1
    status = [MISSING if i % 7 == 0 else OK for i in range(N)]
    status[10] = FAILED
    path = folder / "wide.parquet"
    write_features(path, [f"i{i}" for i in range(N)], vectors.astype(np.float32), status, {"model": "real"}, dtype)
    return path


def reduced(features: Path, dim: int, name: str = "reduced", threads: int | None = None) -> tuple[Any, dict[str, Any]]:
    output = features.with_name(f"{name}.parquet")
    arguments: dict[str, Any] = {"reduction": Reduction(method="pca", dim=dim), "threads": threads}
    facts = reduce(features=features, output=output, projection=output.with_suffix(".safetensors"), **arguments)
    return read_features(output), facts


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_items_with_a_vector_are_projected_and_the_others_stay_without(tmp_path: Path, dtype: str):
    before = read_features(wide(tmp_path, dtype))
    after, facts = reduced(tmp_path / "wide.parquet", 5)
    assert after.item_ids == before.item_ids and after.status.tolist() == before.status.tolist()
    assert after.embedding.shape == (N, 5) and not after.embedding[~before.ok].any()
    exact = before.embedding[before.ok].astype(np.float64)
    _, singular, axes = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
    signs = np.sign(axes[np.arange(5), np.abs(axes[:5]).argmax(1)])
    np.testing.assert_allclose(after.embedding[before.ok], exact @ axes[:5].T * signs, atol=1e-5)
    kept = (singular[:5] ** 2).sum() / (singular**2).sum()
    assert facts["counts"] == {"items": 60, "ok": 50, "missing": 9, "failed": 1}
    assert (facts["from"], facts["dim"]) == (D, 5) and facts["explained_variance"] == pytest.approx(kept)
    assert after.metadata["reduce"] == {"method": "pca", "dim": 5, "from": D, "explained_variance": pytest.approx(kept)}
    assert after.metadata["features"] == {"model": "real"}


def test_new_vectors_are_projected_as_those_of_the_items(tmp_path: Path):
    before = read_features(wide(tmp_path))
    after, _ = reduced(tmp_path / "wide.parquet", 4)
    projection = read_projection(tmp_path / "reduced.safetensors")
    np.testing.assert_allclose(projection.project(before.embedding[1:3]), after.embedding[1:3], atol=1e-6)


def test_the_number_of_threads_changes_no_byte(tmp_path: Path):
    path = wide(tmp_path)
    for threads in (1, 2):
        reduced(path, 4, f"by{threads}", threads)
    for suffix in ("parquet", "safetensors"):
        assert sha256_of(tmp_path / f"by1.{suffix}") == sha256_of(tmp_path / f"by2.{suffix}")


def test_the_log_warns_where_much_of_the_variance_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        reduced(wide(tmp_path), 5)
        assert "16 numbers reduced to 5" in caplog.text and "WARNING" not in caplog.text
        _, facts = reduced(tmp_path / "wide.parquet", 1)
    assert f"1 of 16 numbers keep only {100 * facts['explained_variance']:.1f} % of the variance" in caplog.text


@pytest.mark.parametrize(
    ("dim", "complaint"),
    [
        (16, "vectors of 16 numbers, which reduce.dim = 16 does not"),
        (40, "vectors of 16 numbers, .* give a dim below 16"),
    ],
)
def test_a_dim_that_does_not_reduce_is_an_error(tmp_path: Path, dim: int, complaint: str):
    with pytest.raises(UserError, match=rf"wide\.parquet: has {complaint}"):
        reduced(wide(tmp_path), dim)


def test_too_few_vectors_are_an_error(tmp_path: Path):
    status = [OK] * 8 + [MISSING] * 52
    vectors = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    write_features(tmp_path / "few.parquet", [f"i{i}" for i in range(N)], vectors, status, {})
    with pytest.raises(
        UserError, match=r"has 8 vectors, too few for the 8 axes .* give a dim below 8, or remove reduce"
    ):
        reduced(tmp_path / "few.parquet", 8)
    assert reduced(tmp_path / "few.parquet", 7)[1]["explained_variance"] == pytest.approx(1)
