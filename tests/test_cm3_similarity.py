"""The similarity stage: its table, what has no vector, and inputs that cannot work."""

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pytest

from cm3.similarity import similarity
from stages.errors import UserError
from stages.tables import SIMILARITY, read_metadata, read_table, write_features


def run(folder, vectors, status, knn_k):
    ids = [f"i{n}" for n in range(len(vectors))]
    write_features(folder / "features.parquet", ids, vectors, status, {"model": "m"})
    facts = similarity(features=folder / "features.parquet", output=folder / "similarity.parquet", knn_k=knn_k)
    return facts, read_table(folder / "similarity.parquet", SIMILARITY)


def test_rows_are_the_nearest_usable_items_in_order(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (40, 4)).astype(np.float32)
    vectors[7] = 0
    status = ["ok"] * 40
    status[3], status[20] = "missing", "failed"
    facts, table = run(tmp_path, vectors, status, 5)
    assert facts == {"items": 40, "with_vector": 38, "zero_vectors": 1 + int((~vectors[[i for i in range(40) if i not in (3, 7, 20)]].any(1)).sum())}  # fmt: skip
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
    assert read_metadata(tmp_path / "similarity.parquet") == {"knn_k": 5, "features": {"model": "m"}}


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

    from stages.tables import features_schema

    schema = features_schema(2, "float32")
    values = pa.array(np.array([1, 0, np.nan, 1], np.float32))
    vectors = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
    status = pa.array(["ok", "ok"]).dictionary_encode().cast(schema.field("status").type)
    pq.write_table(pa.table([pa.array(["a", "b"]), vectors, status], schema=schema), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="NaN or infinity, first for items b"):
        similarity(features=tmp_path / "f.parquet", output=tmp_path / "s.parquet", knn_k=1)
