"""Principal components: against a singular value decomposition, whatever the blocks and threads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cm3.common import pca
from cm3.common.errors import DamagedFileError
from cm3.common.pca import Projection, fit_pca, read_projection

N, D, K = 300, 40, 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and tiles of which the vectors fill several, the last one in part."""
    monkeypatch.setattr(pca, "BLOCK", 64)
    monkeypatch.setattr(pca, "TILE", 16)


def vectors(seed: int = 0) -> np.ndarray:
    """Vectors with a mean far from the origin and variances that differ."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((N, D)) * np.geomspace(10, 0.1, D) @ np.linalg.qr(rng.standard_normal((D, D)))[0]
    return (mixed + 5 * rng.standard_normal(D)).astype(np.float32)


def same(one: Projection, other: Projection) -> bool:
    return all(torch.equal(x, other.tensors()[name]) for name, x in one.tensors().items())


def test_axes_and_variances_are_those_of_a_singular_value_decomposition():
    x, chosen = vectors(), np.arange(N) % 3 > 0
    found = fit_pca(x, K, chosen)
    exact = x[chosen].astype(np.float64)
    mean = exact.mean(0)
    _, singular, axes = np.linalg.svd(exact - mean, full_matrices=False)
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    np.testing.assert_allclose(found.axes, axes[:K], atol=1e-10)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.variances, singular[:K] ** 2 / (chosen.sum() - 1), rtol=1e-10)
    assert found.explained_variance == pytest.approx((singular[:K] ** 2).sum() / (singular**2).sum())


def test_coordinates_are_not_centred_and_those_of_a_centred_projection_but_for_a_constant():
    x = vectors()
    found = fit_pca(x, K, np.ones(N, bool))
    axes, mean = found.axes.numpy(), found.mean.numpy()
    coordinates = found.project(x)
    assert coordinates.dtype == np.float32
    np.testing.assert_allclose(coordinates, x.astype(np.float64) @ axes.T, atol=1e-5)
    np.testing.assert_allclose(coordinates - axes @ mean, (x - mean) @ axes.T, atol=1e-5)


def test_rows_that_are_not_chosen_have_no_effect_and_a_row_with_nan_stays_one():
    x, chosen = vectors(), np.arange(N) % 3 > 0
    other = x.copy()
    other[~chosen] = np.nan
    found = fit_pca(x, K, chosen)
    assert same(found, fit_pca(other, K, chosen))
    np.testing.assert_array_equal(np.isfinite(found.project(other)).all(1), chosen)


def test_the_number_of_threads_changes_no_digit():
    x, every = vectors(), np.ones(N, bool)
    before = torch.get_num_threads()
    one, *others = (fit_pca(x, K, every, threads) for threads in (1, 2, 5))
    assert all(same(one, other) for other in others)
    assert (one.project(x, 1) == one.project(x, 3)).all()
    assert torch.get_num_threads() == before


def test_vectors_that_are_all_equal_lose_nothing():
    found = fit_pca(np.ones((20, 5), np.float32), 2, np.ones(20, bool))
    assert found.explained_variance == 1
    assert np.isfinite(found.project(np.ones((1, 5), np.float32))).all()


def test_a_projection_is_stored_to_the_last_digit_and_its_damage_is_noticed(tmp_path: Path):
    found = fit_pca(vectors(), K, np.ones(N, bool))
    path = tmp_path / "p.safetensors"
    found.save(path)
    assert same(read_projection(path), found)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"p\.safetensors"):
        read_projection(path)
