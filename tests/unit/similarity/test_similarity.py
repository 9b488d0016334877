"""The similarity stage: its table, what has no vector, and inputs that cannot work."""

import sys
from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pytest
import torch
import yaml
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.features import write_features
from cm3.common.tables import SIMILARITY, read_metadata, read_table
from cm3.config import Model, settings
from cm3.similarity.exact import knn
from cm3.similarity.stage import similarity
from workflow.plan import features
from workflow.plan.config import load_config


def run(folder, vectors, status, knn_k, **settings):
    ids = [f"i{n}" for n in range(len(vectors))]
    write_features(folder / "features.parquet", ids, vectors, status, {"model": "m"})
    paths = {"features": folder / "features.parquet", "output": folder / "similarity.parquet"}
    facts = similarity(**paths, knn_k=knn_k, **settings)
    return facts, read_table(folder / "similarity.parquet", SIMILARITY)


def test_rows_are_the_nearest_usable_items_in_order(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (40, 4)).astype(np.float32)
    vectors[7] = 0
    status = ["ok"] * 40
    status[3], status[20] = "missing", "failed"
    facts, table = run(tmp_path, vectors, status, 5)
    assert facts == {
        "items": 40,
        "with_vector": 38,
        "searched": table.num_rows // 5,
        "zero_vectors": 1 + int((~vectors[[i for i in range(40) if i not in (3, 7, 20)]].any(1)).sum()),
    }
    usable = [i for i in range(40) if status[i] == "ok" and vectors[i].any()]
    items, neighbours, scores = (table.column(name).to_numpy() for name in SIMILARITY.names)
    assert items.tolist() == [i for i in usable for _ in range(5)]
    assert set(neighbours.tolist()) <= set(usable)
    order = np.lexsort((neighbours, -scores, items))
    np.testing.assert_array_equal(order, np.arange(len(items)))
    unit = oracle.unit_rows(vectors[usable].astype(np.float64))
    best = np.sort(np.float32(unit @ unit.T), axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(scores.reshape(-1, 5), best, atol=1e-7)
    assert (scores.reshape(-1, 5)[:, 0] == 1).all()
    assert read_metadata(tmp_path / "similarity.parquet") == {
        "knn_k": 5,
        "method": "exact",
        "missing": "drop",
        "features": {"model": "m"},
    }


def test_two_runs_write_the_same_bytes(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((60, 9)).astype(np.float32)
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        run(tmp_path / name, vectors, ["ok"] * 60, 10)
        written.append((tmp_path / name / "similarity.parquet").read_bytes())
    assert written[0] == written[1]


def test_fewer_items_than_neighbours(tmp_path):
    with pytest.raises(UserError, match="4 items have a vector, fewer than knn_k = 5; lower"):
        run(tmp_path, np.ones((6, 2), np.float32), ["ok"] * 4 + ["missing"] * 2, 5)
    assert not (tmp_path / "similarity.parquet").exists()


def test_a_modality_without_any_vector(tmp_path):
    with pytest.raises(UserError, match="none of its 6 items has a vector"):
        run(tmp_path, np.ones((6, 2), np.float32), ["missing"] * 6, 2)


def test_nan_in_the_features(tmp_path):
    import pyarrow.parquet as pq

    from cm3.common.features import features_schema

    schema = features_schema(2, "float32")
    values = pa.array(np.array([1, 0, np.nan, 1], np.float32))
    vectors = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
    status = pa.array(["ok", "ok"]).dictionary_encode().cast(schema.field("status").type)
    pq.write_table(pa.table([pa.array(["a", "b"]), vectors, status], schema=schema), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="NaN or infinity, first for items b"):
        similarity(features=tmp_path / "f.parquet", output=tmp_path / "s.parquet", knn_k=1)


def test_missing_items_take_part_with_the_mean_of_the_others(tmp_path):
    vectors = np.random.default_rng(2).standard_normal((30, 6)).astype(np.float32) + 1
    vectors[4] = 0
    status = ["ok"] * 30
    status[3], status[20] = "missing", "failed"
    facts, table = run(tmp_path, vectors, status, 3, missing="mean")
    assert facts == {"items": 30, "with_vector": 28, "zero_vectors": 1, "searched": 29}
    ok = [i for i in range(30) if i not in (3, 20)]
    vectors[[3, 20]] = vectors[ok].mean(0, dtype=np.float64)
    usable = np.delete(np.arange(30), 4)
    indices, scores = knn(torch.from_numpy(vectors[usable]), 3)
    items, neighbours, found = (table.column(name).to_numpy() for name in SIMILARITY.names)
    np.testing.assert_array_equal(items, np.repeat(usable, 3))
    np.testing.assert_array_equal(neighbours, usable[indices.numpy().ravel()])
    np.testing.assert_array_equal(found, scores.numpy().ravel())
    assert neighbours[items == 20].tolist()[:2] == [3, 20]
    assert read_metadata(tmp_path / "similarity.parquet")["missing"] == "mean"


def test_a_mean_of_no_vector(tmp_path):
    with pytest.raises(UserError, match="none of its 6 items has a vector"):
        run(tmp_path, np.ones((6, 2), np.float32), ["missing"] * 6, 2, missing="mean")


def clustered(n):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((n // 20, 16))[rng.integers(0, n // 20, n)] + 0.3 * rng.standard_normal((n, 16))
    vectors[50:120] = vectors[7]  # more equal vectors than candidates
    return vectors.astype(np.float32)


@pytest.mark.parametrize("method", ["hnsw", "ivf"])
def test_approximate_neighbours_have_exact_scores_and_a_measured_recall(tmp_path, method):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    vectors = clustered(3000)
    facts, table = run(tmp_path, vectors, ["ok"] * 3000, 10, method=method)
    first = (tmp_path / "similarity.parquet").read_bytes()
    run(tmp_path, vectors, ["ok"] * 3000, 10, method=method)
    assert (tmp_path / "similarity.parquet").read_bytes() == first
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
    told = read_metadata(tmp_path / "similarity.parquet")
    assert told["method"] == method and told["recall"] == facts["recall"]


def test_rows_for_which_faiss_finds_too_little_are_searched_exactly(monkeypatch):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    from cm3.similarity import approximate

    def poor(*given):
        found, breadth = honest(*given)
        found[::3, 2:] = -1
        return found, breadth

    honest = approximate.faiss_candidates
    monkeypatch.setattr(approximate, "faiss_candidates", poor)
    x = torch.from_numpy(clustered(300))
    indices, scores, facts = approximate.approximate_knn(x, 5, "ivf")
    exact, best = knn(x, 5)
    assert facts["searched_exactly"] == 100
    assert torch.equal(indices[::3], exact[::3]) and torch.equal(scores[::3], best[::3])


def test_the_search_widens_until_its_recall_is_good(caplog):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    from cm3.similarity.approximate import approximate_knn

    # Rows without clusters, the harder the more dimensions they have.
    generator = torch.Generator().manual_seed(0)
    found = [approximate_knn(torch.randn(3000, d, generator=generator), 10, "ivf")[2] for d in (4, 12)]
    assert found[0]["breadth"] < found[1]["breadth"] <= 64
    assert min(facts["recall"] for facts in found) >= 0.99 and not caplog.text
    facts = approximate_knn(torch.randn(3000, 96, generator=generator), 10, "ivf")[2]
    assert facts["recall"] < 0.99 and facts["breadth"] == 64
    assert f"recall {facts['recall']:.4f} of ivf at a breadth of 64; knn_method: exact finds all" in caplog.text


@pytest.mark.parametrize("method", ["hnsw", "ivf"])
@pytest.mark.parametrize("n", [1, 7])
def test_approximate_search_among_few(method, n):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    from cm3.similarity.approximate import approximate_knn

    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    indices, scores, _ = approximate_knn(x, n, method)
    assert torch.equal(indices, knn(x, n)[0]) and torch.equal(scores, knn(x, n)[1])


def test_without_faiss_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="uv pip install faiss-cpu"):
        run(tmp_path, np.eye(6, dtype=np.float32), ["ok"] * 6, 2, method="hnsw")
    assert not (tmp_path / "similarity.parquet").exists()


def test_each_variant_of_the_graph_has_a_path_and_a_task_of_its_own():
    config = load_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    dataset, extractor = "baby", config.experiments["baby"].modalities["text"]
    stem = Path(features.features_path(config, dataset, extractor)).stem
    identities = set()
    for method in ("exact", "hnsw", "ivf"):
        for missing in ("drop", "mean"):
            variant = f"-{method}".replace("-exact", "") + f"-{missing}".replace("-drop", "")
            model = Model(knn_k=7, knn_method=method, knn_missing=missing)
            path = features.similarity_path(config, dataset, extractor, model)
            assert path == f"processed/{dataset}/similarity/{stem}-k7{variant}.parquet"
            task = features.similarity(config, "7", variant)
            assert task.spec == {"knn_k": 7, "method": method, "missing": missing}
            identities.add(task.identity)
    assert len(identities) == 6


def test_only_the_official_preset_lets_missing_items_take_part():
    assert Model().knn_missing == "drop" and Model().knn_method == "exact"
    assert settings("official", {}, {}, {}, "x").model.knn_missing == "mean"


def test_an_ivf_index_does_not_depend_on_the_number_of_threads(monkeypatch):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    from cm3.similarity import approximate

    unit = torch.nn.functional.normalize(torch.randn(9000, 260), dim=1).numpy()
    sample, exact = np.arange(50), np.full((50, 5), 0.1, np.float32)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(approximate.faiss_candidates(faiss, unit, 12, "ivf", sample, exact))
    monkeypatch.setattr(approximate, "add_in_blocks", lambda faiss, index, unit, threads: index.add(unit))
    found.append(approximate.faiss_candidates(faiss, unit, 12, "ivf", sample, exact))
    for candidates, breadth in found[1:]:
        assert breadth == found[0][1]
        np.testing.assert_array_equal(candidates, found[0][0])
