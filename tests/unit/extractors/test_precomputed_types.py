"""Types of vectors computed elsewhere: every list of numbers is read, and others are refused with row and column."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import extractors
from cm3.common.errors import UserError

IDS = ["a", "b", "c"]
LISTS = [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]


def encode(path: Path, wanted: list[str] = IDS, **settings: Any) -> Any:
    extractor = extractors.load({"modality": "text", "backend": "precomputed", "path": str(path), **settings})
    return extractor.encode([{"item_id": name} for name in wanted])


def parquet(folder: Path, ids: Any = IDS, vectors: Any = LISTS) -> Path:
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors}), folder / "v.parquet", row_group_size=2)
    return folder / "v.parquet"


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array(LISTS, pa.large_list(pa.float32())),
        pa.array(LISTS, pa.list_(pa.float64(), 2)),
        pa.array([np.asarray(x, np.float16) for x in LISTS], pa.list_(pa.float16())),
        pa.array(LISTS, pa.list_view(pa.float32())),
        pa.array(LISTS).cast(pa.list_(pa.decimal128(10, 2))),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2]), pa.array(LISTS, pa.list_(pa.float32(), 2))
        ),
    ],
    ids=lambda column: str(column.type),
)
def test_every_list_of_numbers_is_a_vector(tmp_path: Path, vectors: pa.Array) -> None:
    found = encode(parquet(tmp_path, vectors=vectors))
    assert found.embedding.tolist() == LISTS and set(found.status.tolist()) == {"ok"}


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (pa.array(IDS, pa.string_view()), IDS),
        (pa.array(IDS).dictionary_encode(), IDS),
        (pa.array([name.encode() for name in IDS]), IDS),
        (pa.array([1.0, 2.0, 3e6]), ["1", "2", "3000000"]),
        (pa.array([1, 2, 3]), ["1", "2", "3"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_ids_of_every_type_are_found(tmp_path: Path, ids: pa.Array, wanted: list[str]) -> None:
    assert encode(parquet(tmp_path, ids), wanted).embedding.tolist() == LISTS


@pytest.mark.parametrize(
    ("vectors", "complaint"),
    [
        (
            [[x] for x in LISTS],
            r"row 0: embedding = \[\[0\.5, 1\.5\]\] is of type list<.*list<.*>>, not a list of numbers",
        ),
        (
            [[str(x) for x in pair] for pair in LISTS],
            r"row 0: embedding = \['0\.5', '1\.5'\] is of type list<.*string>",
        ),
        ([[{"x": 1.0}]] * 3, r"row 0: embedding = .*struct"),
        ([{"x": 1.0}] * 3, r"row 0: embedding = .*struct"),
        ([json.dumps(pair) for pair in LISTS], r"row 0: embedding = '\[0\.5, 1\.5\]' is of type string"),
        ([None, None, "[1.0]"], r"row 2: embedding = '\[1\.0\]' is of type string, not a list of numbers"),
        ([[], [], []], r"row 0: embedding = \[\] is an empty vector"),
        ([*LISTS[:2], []], r"row 2: embedding = \[\] is an empty vector"),
        ([*LISTS[:2], [1.0]], r"row 2: embedding = \[1\.0\] has 1 numbers, those before it 2"),
        ([LISTS[0], None, [1.0, None]], r"row 2: embedding = \[1\.0, None\] holds a null"),
        ([*LISTS[:2], [1e300, 1.0]], r"row 2: embedding = \[1e\+300, 1\.0\] holds a number beyond float32"),
    ],
)
def test_other_vectors_are_refused_with_row_and_column(tmp_path: Path, vectors: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"v\.parquet, {complaint}"):
        encode(parquet(tmp_path, vectors=vectors))


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (["a", "b", None], "row 2: item_id = None is empty; every vector needs an item id"),
        (["a", "b", ""], "row 2: item_id = '' is empty"),
        ([1.0, 2.0, float("nan")], "row 2: item_id = nan is a missing value"),
        ([1.0, 2.0, 2.5], r"row 2: item_id = 2\.5 is not a whole number"),
        ([True, False, True], "row 0: item_id = True is of type bool"),
        ([{"id": "a"}] * 3, "row 0: item_id = {'id': 'a'} is of type struct"),
        ([b"a", b"b", b"\xff"], r"row 2: item_id = b'\\xff' is binary data"),
    ],
)
def test_other_ids_are_refused_with_row_and_column(tmp_path: Path, ids: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"v\.parquet, {complaint}"):
        encode(parquet(tmp_path, ids))


def test_an_id_without_a_vector_may_be_missing(tmp_path: Path) -> None:
    assert (
        encode(parquet(tmp_path, ["a", None, "c"], [LISTS[0], None, LISTS[2]]), ["a", "c"]).status.tolist()
        == ["ok"] * 2
    )


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = [f"i{n}" for n in range(3000)]
    pq.write_table(
        pa.table({"item_id": many, "embedding": rng.normal(size=(3000, 8)).tolist()}), tmp_path / "v.parquet"
    )
    whole = (tmp_path / "v.parquet").read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle],
        b"",
        whole[: middle - 200] + bytes(400) + whole[middle + 200 :],
        whole[:-40] + b"\xff" * 28 + whole[-12:],
    ):
        (tmp_path / "v.parquet").write_bytes(damaged)
        try:
            encode(tmp_path / "v.parquet", many)
        except UserError as error:
            assert "v.parquet" in str(error)


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones((3, 1, 2)), np.ones((3, 2), bool), np.ones((3, 0)), np.ones((3, 2), complex)]
)
def test_an_array_of_another_shape_or_type_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "v.npy", array)
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    with pytest.raises(UserError, match=rf"expected an array .* of shape .* and type {array.dtype}"):
        encode(tmp_path / "v.npy", ids=str(tmp_path / "ids.txt"))


def test_ids_of_an_array_are_lines_of_text(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.asarray(LISTS))
    ids = tmp_path / "ids.txt"
    odd = ["a\u2028b", "c\x85d", "e\x0cf"]
    ids.write_text("\ufeff" + "\r\n".join(odd) + "\r\n\r\n", encoding="utf-8", newline="")
    assert encode(tmp_path / "v.npy", odd, ids=str(ids)).embedding.tolist() == LISTS
    ids.write_text("a\n\nc\n")
    with pytest.raises(UserError, match=r"ids\.txt, line 2: '' is empty; every row of the vectors needs an item id"):
        encode(tmp_path / "v.npy", ids=str(ids))
    np.save(tmp_path / "v.npy", np.asarray([*LISTS[:2], [1e300, 1]]))
    ids.write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"v\.npy, row 2: holds a number beyond float32"):
        encode(tmp_path / "v.npy", ids=str(ids))


def test_a_folder_in_place_of_a_file_is_named_with_its_key(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.asarray(LISTS))
    (tmp_path / "v.parquet").mkdir()
    with pytest.raises(UserError, match=r"path = .*v\.parquet': is a folder, not a file"):
        encode(tmp_path / "v.parquet")
    with pytest.raises(UserError, match=r"ids = .*v\.parquet': is a folder, not a file"):
        encode(tmp_path / "v.npy", ids=str(tmp_path / "v.parquet"))
