"""Approximate search: exact scores, a measured recall, and cells that do not depend on the number of threads."""

import sys

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch

from cm3.common.errors import UserError
from cm3.common.features import write_features
from cm3.common.tables import SIMILARITY, read_metadata, read_table
from cm3.similarity import ivf
from cm3.similarity.approximate import approximate_knn
from cm3.similarity.exact import UnitRows, knn
from cm3.similarity.stage import similarity
from cm3.similarity.workers import one_thread_each


@pytest.fixture(params=["hnsw", "ivf"])
def method(request):
    """Each approximate method that can run here."""
    if request.param == "hnsw":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    return request.param


def clustered(n):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((n // 20, 16))[rng.integers(0, n // 20, n)] + 0.3 * rng.standard_normal((n, 16))
    vectors[50:120] = vectors[7]  # more equal vectors than candidates
    return vectors.astype(np.float32)


def run(folder, vectors, method):
    ids = [f"i{n}" for n in range(len(vectors))]
    write_features(folder / "features.parquet", ids, vectors, ["ok"] * len(vectors), {"model": "m"})
    output = folder / "similarity.parquet"
    facts = similarity(features=folder / "features.parquet", output=output, knn_k=10, method=method)
    return facts, output


def test_neighbours_have_exact_scores_and_a_measured_recall(tmp_path, method):
    vectors = clustered(3000)
    facts, output = run(tmp_path, vectors, method)
    first = output.read_bytes()
    run(tmp_path, vectors, method)
    assert output.read_bytes() == first
    table = read_table(output, SIMILARITY)
    items, neighbours, scores = (table.column(name).to_numpy() for name in SIMILARITY.names)
    np.testing.assert_array_equal(items, np.repeat(np.arange(3000), 10))
    np.testing.assert_array_equal(np.lexsort((neighbours, -scores, items)), np.arange(30_000))
    pairs = list(zip(items.tolist(), neighbours.tolist(), strict=True))
    assert len(set(pairs)) == 30_000 and set(zip(range(3000), range(3000), strict=True)) - set(pairs) <= {
        (i, i) for i in range(50, 120)
    }
    unit = oracle.unit_rows(vectors.astype(np.float64))
    np.testing.assert_array_equal(scores, np.float32((unit[items] * unit[neighbours]).sum(1)))
    _, exact = knn(torch.from_numpy(vectors), 10)
    rows = np.random.default_rng(0).choice(3000, 1000, replace=False)
    expected = (scores.reshape(-1, 10)[rows] >= exact.numpy()[rows, -1:]).mean()
    assert facts["recall"] == pytest.approx(expected) and facts["recall"] > 0.95 and facts["recall_rows"] == 1000
    metadata = read_metadata(output)
    assert metadata["method"] == method and metadata["recall"] == facts["recall"]


def test_rows_with_too_few_candidates_are_searched_exactly(monkeypatch):
    def poor(cells, rows):
        found = complete(cells, rows)
        found[rows % 3 == 0, 2:] = -1
        return found

    complete = ivf.Cells.candidates
    monkeypatch.setattr(ivf.Cells, "candidates", poor)
    x = torch.from_numpy(clustered(300))
    indices, scores, facts = approximate_knn(x, 5, "ivf")
    exact, best = knn(x, 5)
    assert facts["searched_exactly"] == 100
    assert torch.equal(indices[::3], exact[::3]) and torch.equal(scores[::3], best[::3])


def test_the_search_widens_until_its_recall_is_good(caplog):
    # Rows without clusters, the harder the more dimensions they have.
    generator = torch.Generator().manual_seed(0)
    found = [approximate_knn(torch.randn(3000, d, generator=generator), 10, "ivf")[2] for d in (4, 12)]
    assert found[0]["breadth"] < found[1]["breadth"] <= 64
    assert min(facts["recall"] for facts in found) >= 0.99 and not caplog.text
    facts = approximate_knn(torch.randn(3000, 96, generator=generator), 10, "ivf")[2]
    assert facts["recall"] < 0.99 and facts["breadth"] == 64
    assert f"recall {facts['recall']:.4f} of ivf at a breadth of 64; knn_method: exact finds all" in caplog.text


@pytest.mark.parametrize("n", [1, 7])
def test_search_among_few_rows_is_exact(method, n):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    indices, scores, _ = approximate_knn(x, n, method)
    assert torch.equal(indices, knn(x, n)[0]) and torch.equal(scores, knn(x, n)[1])


def test_without_faiss_the_error_says_what_to_install_and_ivf_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = clustered(100)
    with pytest.raises(UserError, match="uv pip install faiss-cpu"):
        run(tmp_path, vectors, "hnsw")
    assert not (tmp_path / "similarity.parquet").exists()
    assert run(tmp_path, vectors, "ivf")[0]["recall"] == 1


@pytest.mark.parametrize("scale", [1, 1e36, 1e-36])
def test_candidates_are_the_nearest_rows_of_the_nearest_cells(scale, monkeypatch):
    # Small blocks, so that cells and the rows that search them are split.
    monkeypatch.setattr(ivf, "ENTRIES", 40 * 8)
    x = torch.from_numpy(clustered(2000)[:, :8].copy()) * scale
    unit = oracle.unit_rows(x.numpy().astype(np.float64))
    with one_thread_each() as pool:
        cells = ivf.Cells(UnitRows(x), 12, pool)
    cells.breadth = 5
    near = torch.empty((2000, 5), dtype=torch.int64)
    ivf.nearest_cells(UnitRows(x), torch.arange(2000), cells.centroids, near)
    parts = cells.parts()
    assert len(parts) >= 8 and sorted(torch.cat(parts).tolist()) == list(range(2000))
    for rows in parts:
        for row, found in zip(rows.tolist(), cells.candidates(rows).tolist(), strict=True):
            products = np.where(np.isin(cells.cell_of, near[row]), unit @ unit[row], -np.inf)
            assert len(set(found)) == 12
            np.testing.assert_allclose(np.sort(products[found]), np.sort(products)[-12:], atol=1e-6)


def test_cells_without_rows_are_searched_as_well():
    x = torch.eye(4).repeat(50, 1)  # four different rows, 56 cells
    indices, scores, facts = approximate_knn(x, 5, "ivf")
    assert (scores == 1).all() and (indices % 4 == torch.arange(200)[:, None] % 4).all() and facts["recall"] == 1


def test_a_row_of_zeros_has_candidates():
    x = torch.from_numpy(clustered(300))
    x[3] = 0
    indices, scores, _ = approximate_knn(x, 5, "ivf")
    assert len(set(indices[3].tolist())) == 5 and not scores[3].any()


def test_centroids_are_the_directions_of_the_rows_around_them():
    x = torch.from_numpy(clustered(2000))
    unit = oracle.unit_rows(x.numpy().astype(np.float64))
    with one_thread_each() as pool:
        centroids = ivf.spherical_kmeans(UnitRows(x), 100, pool)
        cells = ivf.assign(UnitRows(x), torch.arange(2000), centroids, pool)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    assert len(cells.unique()) == 100
    random = np.random.default_rng(1).choice(2000, 100, replace=False)
    assert (unit * centroids.numpy()[cells]).sum(1).mean() > (unit @ unit[random].T).max(1).mean() + 0.03
    sums = np.stack([unit[cells.numpy() == cell].sum(0) for cell in range(100)])
    assert (oracle.unit_rows(sums) * centroids.numpy()).sum(1).mean() > 0.99


def test_neighbours_by_cells_do_not_depend_on_the_number_of_threads():
    x = torch.randn(3000, 260, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with one_thread_each() as pool:
                cells = ivf.Cells(UnitRows(x), 12, pool)
            found.append((cells.centroids, cells.cell_of, *approximate_knn(x, 5, "ivf")[:2]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
