"""Controls: features of the same shape without content, and nothing else about the file changed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.common.features import read_features, write_features
from cm3.common.files import sha256_of
from cm3.common.tables import FAILED, MISSING, OK
from extractors.control import BLOCK, CONTROLS, control, gaussian

N, D = 60, 16


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """60 items, every seventh missing and one failed, rows of very different lengths."""
    rng = np.random.default_rng(3)
    vectors = (rng.standard_normal((N, D)) * rng.uniform(0.1, 50, (N, 1))).astype(np.float32)
    status = [MISSING if i % 7 == 0 else OK for i in range(N)]
    status[10] = FAILED
    path = tmp_path / "features.parquet"
    write_features(path, [f"i{i}" for i in range(N)], vectors, status, {"model": "real"})
    return path


def made(features: Path, kind: str, seed: int = 1, modality: str = "text", name: str = "control.parquet"):
    output = features.parent / name
    facts = control(features=features, output=output, kind=kind, seed=seed, modality=modality)
    return read_features(output), facts


@pytest.mark.parametrize("kind", CONTROLS)
def test_ids_statuses_and_empty_rows_stay(features: Path, kind: str):
    real = read_features(features)
    fake, facts = made(features, kind)
    assert fake.item_ids == real.item_ids
    assert fake.status.tolist() == real.status.tolist()
    assert fake.embedding.shape == real.embedding.shape
    assert not fake.embedding[~real.ok].any()
    assert fake.embedding[real.ok].any(axis=1).all()
    assert facts == {"items": 60, "ok": 50, "missing": 9, "failed": 1}
    assert fake.metadata["control"] == {"kind": kind, "seed": 1, "modality": "text"}
    assert fake.metadata["features"] == {"model": "real"}


def test_gaussian_rows_are_as_long_as_the_real_ones_and_point_elsewhere(features: Path):
    real, (fake, _) = read_features(features), made(features, "gaussian")
    lengths = [np.linalg.norm(x.embedding[real.ok].astype(np.float64), axis=1) for x in (real, fake)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-6)
    cosines = (fake.embedding * real.embedding).sum(1)[real.ok] / lengths[0] ** 2
    assert np.abs(cosines).max() < 0.95
    assert abs(cosines.mean()) < 0.2


@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_row_of_zeros_stays_one(rows: int, seed: int):
    assert not gaussian(np.zeros((rows, 4), np.float32), np.random.default_rng(seed)).any()


def test_gaussian_directions_are_uniform_over_blocks():
    vectors = np.ones((BLOCK + 500, 3), np.float32)
    drawn = gaussian(vectors, np.random.default_rng(0)) / np.sqrt(3)
    for part in (drawn[:BLOCK], drawn[BLOCK:]):
        # Of a uniform direction in R^3, the mean is 0 and the second moments are 1/3.
        np.testing.assert_allclose(part.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(part.T @ part / len(part), np.eye(3) / 3, atol=0.06)
    assert len(np.unique(drawn.round(6), axis=0)) == len(drawn)


def test_shuffled_rows_are_the_real_ones_in_another_order(features: Path):
    real, (fake, _) = read_features(features), made(features, "shuffled")
    before, after = real.embedding[real.ok], fake.embedding[real.ok]
    order = np.lexsort(before.T), np.lexsort(after.T)
    np.testing.assert_array_equal(before[order[0]], after[order[1]])
    assert (before != after).any(axis=1).mean() > 0.8


def test_constant_rows_are_all_one_vector_of_the_mean_length(features: Path):
    real, (fake, _) = read_features(features), made(features, "constant")
    rows = fake.embedding[real.ok]
    assert (rows == rows[0]).all()
    mean = np.linalg.norm(real.embedding[real.ok].astype(np.float64), axis=1).mean()
    assert np.linalg.norm(rows[0].astype(np.float64)) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("kind", CONTROLS)
def test_the_same_seed_gives_the_same_bytes(features: Path, kind: str):
    for name in ("a.parquet", "b.parquet"):
        made(features, kind, name=name)
    assert sha256_of(features.parent / "a.parquet") == sha256_of(features.parent / "b.parquet")


@pytest.mark.parametrize("kind", ["gaussian", "shuffled"])
def test_another_seed_or_modality_gives_another_draw(features: Path, kind: str):
    first = made(features, kind)[0].embedding
    assert (made(features, kind, seed=2)[0].embedding != first).any()
    assert (made(features, kind, modality="image")[0].embedding != first).any()


def test_float16_features_become_float32_controls_of_equal_norms(tmp_path: Path):
    vectors = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    write_features(tmp_path / "half.parquet", list("abcdefgh"), vectors, [OK] * 8, {}, "float16")
    real, (fake, _) = read_features(tmp_path / "half.parquet"), made(tmp_path / "half.parquet", "gaussian")
    np.testing.assert_allclose(*(np.linalg.norm(x.embedding, axis=1) for x in (fake, real)), rtol=1e-6)
