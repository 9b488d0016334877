"""Tables keep their contract: columns, types, row order by id, and nothing that is not a number."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.errors import UserError
from cm3.common.features import features_schema, read_features, write_features
from cm3.common.keys import canonical_json, key_of
from cm3.common.tables import SIMILARITY, open_parquet, read_metadata, read_table, write_table

IDS = ["a", "b", "c"]


def vectors(dtype: str = "float32") -> np.ndarray:
    return np.arange(12, dtype=dtype).reshape(3, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_come_back_as_written(tmp_path: Path, dtype: str):
    path = tmp_path / "f.parquet"
    write_features(path, IDS, vectors(), ["ok", "missing", "ok"], {"model": "m", "n": 3}, dtype)
    features = read_features(path, IDS)
    assert features.embedding.dtype == np.float32
    assert features.embedding.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [8, 9, 10, 11]]
    assert features.ok.tolist() == [True, False, True]
    assert features.metadata == {"model": "m", "n": 3} == read_metadata(path)
    schema = pq.read_schema(path).remove_metadata()
    assert schema.equals(features_schema(4, dtype))
    assert not schema.field("embedding").nullable


def test_the_callers_vectors_are_left_as_they_were(tmp_path: Path):
    own = vectors()
    write_features(tmp_path / "f", IDS, own, ["ok", "failed", "ok"], {})
    assert np.array_equal(own, vectors())


def test_features_of_other_row_groups_and_many_rows(tmp_path: Path):
    path = tmp_path / "f.parquet"
    many = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    ids = [f"item{i}" for i in range(20_000)]
    write_features(path, ids, many, ["ok"] * 20_000, {})
    assert np.array_equal(read_features(path, ids).embedding, many)


def test_the_same_features_are_the_same_bytes(tmp_path: Path):
    for name in "ab":
        write_features(tmp_path / name, IDS, vectors(), ["ok"] * 3, {"z": 1, "a": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("ids", "where"), [(["a", "c", "b"], "row 1"), (["a", "b"], "row 2"), ([*IDS, "d"], "row 3")])
def test_features_of_other_items_are_refused(tmp_path: Path, ids: list[str], where: str):
    write_features(tmp_path / "f", IDS, vectors(), ["ok"] * 3, {})
    with pytest.raises(UserError, match=where):
        read_features(tmp_path / "f", ids)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: float):
    broken = vectors()
    broken[1, 2] = value
    with pytest.raises(UserError, match="1 vectors hold NaN or infinity in float16, first for items b"):
        write_features(tmp_path / "f", IDS, broken, ["ok"] * 3, {}, "float16")
    write_features(tmp_path / "f", IDS, broken, ["ok", "failed", "ok"], {}, "float16")


def test_null_vectors_are_refused(tmp_path: Path):
    embedding = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    status = pa.array(["ok", "missing"]).dictionary_encode()
    pq.write_table(pa.table({"item_id": ["a", "b"], "embedding": embedding, "status": status}), tmp_path / "f")
    with pytest.raises(UserError, match="1 vectors are null"):
        read_features(tmp_path / "f")


def test_other_columns_are_refused_with_the_expected_ones(tmp_path: Path):
    pq.write_table(pa.table({"item": [1]}), tmp_path / "t")
    with pytest.raises(UserError, match=r"item int64.*item int32, neighbour int32, score float"):
        read_table(tmp_path / "t", SIMILARITY)
    with pytest.raises(ValueError, match="columns"):
        write_table(tmp_path / "t", pa.table({"item": [1]}), SIMILARITY)


def test_some_columns_are_read_and_all_are_checked(tmp_path: Path):
    table = pa.table({"item": [0, 1], "neighbour": [1, 0], "score": [0.5, 0.5]}).cast(SIMILARITY)
    write_table(tmp_path / "t", table, SIMILARITY)
    assert read_table(tmp_path / "t", SIMILARITY).equals(table)
    assert read_table(tmp_path / "t", SIMILARITY, ["score"]).to_pydict() == {"score": [0.5, 0.5]}
    pq.write_table(table.drop_columns("item"), tmp_path / "t")
    with pytest.raises(UserError, match="are expected"):
        read_table(tmp_path / "t", SIMILARITY, ["score"])


@pytest.mark.parametrize("content", [b"", b"not parquet"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=r"t: damaged \(cut to \d+ bytes\)"):
        read_table(tmp_path / "t", SIMILARITY)
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "absent", SIMILARITY)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_keys_do_not_depend_on_order(settings: dict):
    assert key_of(settings) == key_of(dict(reversed(settings.items())))
    assert len(key_of(settings)) == 12


@given(json_values)
def test_canonical_json_loses_nothing(value: object):
    assert json.loads(canonical_json(value)) == value


def test_vectors_of_embeddings_are_stored_plainly(tmp_path: Path):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    write_embeddings(tmp_path / "users.parquet", "user_id", [f"u{n}" for n in range(50)], vectors, {"epoch": 3})
    with open_parquet(tmp_path / "users.parquet") as file:
        columns = [file.metadata.row_group(0).column(n) for n in range(2)]
    assert {column.compression for column in columns} == {"UNCOMPRESSED"}
    assert not any("DICTIONARY" in encoding for column in columns for encoding in column.encodings)
    found, metadata = read_embeddings(tmp_path / "users.parquet", "user_id", [f"u{n}" for n in range(50)])
    assert np.array_equal(found, vectors) and metadata == {"epoch": 3}
