"""The similarity stage: its table, what has no vector, and inputs that cannot work."""

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
            assert task.version == ("similarity 1, ivf 2" if method == "ivf" else "similarity 1")
            assert task.spec == {"knn_k": 7, "method": method, "missing": missing}
            identities.add(task.identity)
    assert len(identities) == 6


def test_only_the_official_preset_lets_missing_items_take_part():
    assert Model().knn_missing == "drop" and Model().knn_method == "exact"
    assert settings("official", {}, {}, {}, "x").model.knn_missing == "mean"
