"""Vectors computed elsewhere: found by id in every format, whatever their order, and refused when malformed."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_extractors import write_items

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features, write_features
from extractors.extract import extract
from extractors.precomputed.reader import PrecomputedExtractor

IDS = ["B000000003", "B000000001", "B00000000X", "B000000002"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
WANTED = ["B000000001", "B000000002", "B000000009", "B000000003"]
EXPECTED = np.stack([VECTORS[1], VECTORS[3], np.zeros(3), VECTORS[0]]).astype(np.float32)


def write_b(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Write the layout of Amazon's image features: 10 bytes of id, then the float32 numbers."""
    path.write_bytes(
        b"".join(name.encode() + vector.astype("<f4").tobytes() for name, vector in zip(ids, vectors, strict=True))
    )


def files(folder: Path, ids: list[str] = IDS, vectors: np.ndarray = VECTORS) -> dict[str, dict[str, Any]]:
    """Write the same vectors in every form, and return the spec of each."""
    lists = pa.array(vectors.tolist(), pa.list_(pa.float64()))
    pq.write_table(pa.table({"asin": ids, "vector": lists}), folder / "lists.parquet", row_group_size=3)
    write_features(folder / "features.parquet", ids, vectors, ["ok"] * len(ids), {})
    np.save(folder / "v.npy", vectors.astype(np.float64))
    (folder / "ids.txt").write_text("\n".join(ids) + "\n")
    write_b(folder / "v.b", ids, vectors)
    return {
        "lists": {"path": "lists.parquet", "id_column": "asin", "vector_column": "vector"},
        "features": {"path": "features.parquet"},
        "npy": {"path": "v.npy", "ids": str(folder / "ids.txt")},
        "b": {"path": "v.b", "dim": 3},
    }


def spec_of(folder: Path, data: dict[str, Any]) -> Any:
    data = {"modality": "image", "backend": "precomputed"} | data | {"path": str(folder / data["path"])}
    return extractors.parse_extractor("published", data, "extractors.published")


def encode(folder: Path, data: dict[str, Any], wanted: list[str] = WANTED) -> Any:
    extractor = spec_of(folder, data).load()
    assert isinstance(extractor, PrecomputedExtractor)
    return extractor.encode([{"item_id": name} for name in wanted])


@pytest.mark.parametrize("form", ["lists", "features", "npy", "b"])
def test_vectors_are_found_by_id_in_every_form(tmp_path: Path, form: str) -> None:
    found = encode(tmp_path, files(tmp_path)[form])
    assert found.status.tolist() == ["ok", "ok", "missing", "ok"]
    assert np.array_equal(found.embedding, EXPECTED)
    assert "not in" in found.errors[2]


@pytest.mark.parametrize("form", ["lists", "features", "npy", "b"])
def test_an_id_with_two_different_vectors_is_refused(tmp_path: Path, form: str) -> None:
    twice = [*IDS, IDS[0]]
    (tmp_path / "same").mkdir()
    same = encode(tmp_path / "same", files(tmp_path / "same", twice, np.vstack([VECTORS, VECTORS[:1]]))[form])
    assert np.array_equal(same.embedding, EXPECTED)
    with pytest.raises(UserError, match="'B000000003' is duplicated with different vectors"):
        encode(tmp_path, files(tmp_path, twice, np.vstack([VECTORS, VECTORS[:1] + 1]))[form])


def test_items_of_equal_id_and_a_larger_file_than_a_chunk(tmp_path: Path) -> None:
    ids = [f"B{number:09d}" for number in range(3000)]
    vectors = np.random.default_rng(0).normal(size=(3000, 3)).astype(np.float32)
    for data in files(tmp_path, ids, vectors).values():
        found = encode(tmp_path, data, [ids[2999], ids[5], ids[1024], ids[2999]])
        np.testing.assert_allclose(found.embedding, vectors[[2999, 5, 1024, 2999]], rtol=1e-6)


def test_vectors_without_a_value_are_missing(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "embedding": vectors}), tmp_path / "v.parquet")
    found = encode(tmp_path, {"path": "v.parquet"}, ["b", "c"])
    assert found.status.tolist() == ["missing", "ok"] and found.embedding[1].tolist() == [3, 4]
    write_features(tmp_path / "f.parquet", IDS, VECTORS, ["ok", "missing", "failed", "ok"], {})
    assert encode(tmp_path, {"path": "f.parquet"}, IDS).status.tolist() == ["ok", "missing", "missing", "ok"]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.int64()])
def test_a_column_of_another_status_drops_no_vector(tmp_path: Path, kind: pa.DataType) -> None:
    words = pa.array(["active", "sold", "ok", None] if kind != pa.int64() else [1, 0, 1, None])
    status = words.dictionary_encode().cast(kind) if isinstance(kind, pa.DictionaryType) else words
    table = pa.table({"item_id": IDS, "embedding": pa.array(VECTORS.tolist()), "status": status})
    pq.write_table(table, tmp_path / "v.parquet")
    found = encode(tmp_path, {"path": "v.parquet"})
    assert found.status.tolist() == ["ok", "ok", "missing", "ok"] and np.array_equal(found.embedding, EXPECTED)


def damage(folder: Path, form: str) -> str:
    """Spoil one of the files; return the words that the complaint must hold."""
    if form == "b":
        (folder / "v.b").write_bytes((folder / "v.b").read_bytes()[:-5])
        return "not a multiple of the record size 22"
    if form == "npy":
        (folder / "ids.txt").write_text("\n".join(IDS[:3]))
        return "3 ids, but .* has 4 rows"
    if form == "lists":
        ragged = pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
        pq.write_table(pa.table({"asin": ["a", "b"], "vector": ragged}), folder / "lists.parquet")
        return r"row 1: vector = \[1\.0\] has 1 numbers, those before it 2"
    (folder / "features.parquet").write_bytes(b"PAR1 and nothing more")
    return "not a readable Parquet file"


@pytest.mark.parametrize("form", ["lists", "features", "npy", "b"])
def test_malformed_files_are_refused_and_named(tmp_path: Path, form: str) -> None:
    specs = files(tmp_path)
    with pytest.raises(UserError, match=damage(tmp_path, form)) as error:
        encode(tmp_path, specs[form])
    assert str(tmp_path) in str(error.value)


def test_other_columns_and_pickled_arrays_are_refused(tmp_path: Path) -> None:
    files(tmp_path)
    with pytest.raises(UserError, match=r"no column 'item_id'.*set id_column"):
        encode(tmp_path, {"path": "lists.parquet"})
    pq.write_table(pa.table({"item_id": ["a"], "embedding": [1.5]}), tmp_path / "flat.parquet")
    with pytest.raises(UserError, match="not a list of numbers"):
        encode(tmp_path, {"path": "flat.parquet"})
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a plain \.npy array"):
        encode(tmp_path, {"path": "o.npy", "ids": str(tmp_path / "ids.txt")})
    (tmp_path / "empty.b").write_bytes(b"")
    with pytest.raises(UserError, match="holds no vectors"):
        encode(tmp_path, {"path": "empty.b"})


def test_the_stage_takes_the_data_sets_own_file_and_any_modality(tmp_path: Path) -> None:
    files(tmp_path)
    items = write_items(tmp_path, [{"item_id": name} for name in WANTED])
    spec = spec_of(tmp_path, {"path": "v.b", "dim": 3, "modality": "audio"})
    record = extract(spec, {"items": items}, tmp_path / "f.out.parquet", name="published")
    assert record["counts"] == {"ok": 3, "missing": 1, "failed": 0} and record["dim"] == 3
    assert np.array_equal(read_features(tmp_path / "f.out.parquet", WANTED).embedding, EXPECTED)


def test_nan_in_a_file_is_refused_with_the_items_names(tmp_path: Path) -> None:
    spoiled = VECTORS.copy()
    spoiled[1, 2] = np.nan
    data = files(tmp_path, IDS, VECTORS)["npy"]
    np.save(tmp_path / "v.npy", spoiled)
    items = write_items(tmp_path, [{"item_id": name} for name in WANTED])
    with pytest.raises(UserError, match="the vector of id 'B000000001' holds NaN or infinity; remove the row"):
        extract(spec_of(tmp_path, data), {"items": items}, tmp_path / "f.out.parquet")
    assert not (tmp_path / "f.out.parquet").exists()


def test_a_file_with_none_of_the_items_is_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"item_id": "other"}])
    with pytest.raises(UserError, match=r"all 1 inputs failed, first reason: not in v\.b"):
        extract(spec_of(tmp_path, files(tmp_path)["b"]), {"items": items}, tmp_path / "f.out.parquet")


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path) -> None:
    data = files(tmp_path)["npy"]
    (tmp_path / "ids.txt").write_text("\n".join(IDS), encoding="utf-8-sig")
    assert encode(tmp_path, data, IDS).status.tolist() == ["ok"] * 4


def mapping(folder: Path, ids: list[str], order: list[int], end: str = "\n") -> Path:
    """Write MMRec's table of ids and rows, its own rows in the given order."""
    path = folder / "i_id_mapping.csv"
    path.write_text(end.join(["asin\titemID", *(f"{ids[row]}\t{row}" for row in order), ""]), newline="")
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_mmrec_mapping_tells_the_rows_whatever_its_order(tmp_path: Path, end: str) -> None:
    files(tmp_path)
    data = {"path": "v.npy", "ids": str(mapping(tmp_path, IDS, [2, 0, 3, 1], end))}
    found = encode(tmp_path, data)
    assert found.status.tolist() == ["ok", "ok", "missing", "ok"] and np.array_equal(found.embedding, EXPECTED)


def test_mmrec_interactions_tell_the_rows_without_a_mapping(tmp_path: Path) -> None:
    files(tmp_path)
    inter = tmp_path / "shop.inter.gz"
    inter.write_bytes(gzip.compress(b"userID\titemID\tx_label\r\n0\t3\t0\r\n1\t0\t2\r\n"))
    found = encode(tmp_path, {"path": "v.npy", "ids": str(inter)}, ["3", "0", "03", "4"])
    assert found.status.tolist() == ["ok", "ok", "missing", "missing"]
    assert np.array_equal(found.embedding[:2], VECTORS[[3, 0]])
    inter.write_bytes(gzip.compress(b"userID\titemID\n0\t4\n"))
    with pytest.raises(UserError, match=r"shop\.inter\.gz: 5 ids, but .*v\.npy has 4 rows"):
        encode(tmp_path, {"path": "v.npy", "ids": str(inter)})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("asin\titemID\na\t0\nb\t2\nc\t3\nd\t4\n", "4 ids, but none has itemID 1; .* without a gap"),
        ("asin\titemID\na\t0\nb\t1\nc\t1\nd\t2\n", "line 4: itemID 1 is duplicated"),
        ("asin\titemID\na\t0\nb\tone\n", "line 3: expected an id and its itemID"),
        ("asin\titemID\na\t0\nb\n", "line 3: expected an id and its itemID"),
        ("asin\titemID\na\t0\nb\t1\nc\t2\n", "3 ids, but .* has 4 rows"),
    ],
)
def test_a_mapping_that_leaves_rows_open_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    files(tmp_path)
    (tmp_path / "i_id_mapping.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        encode(tmp_path, {"path": "v.npy", "ids": str(tmp_path / "i_id_mapping.csv")})


def test_rows_of_microlens_are_the_videos_from_1(tmp_path: Path) -> None:
    files(tmp_path)
    found = encode(tmp_path, {"path": "v.npy", "format": "microlens"}, ["4", "1", "0", "5"])
    assert found.status.tolist() == ["ok", "ok", "missing", "missing"]
    assert np.array_equal(found.embedding[:2], VECTORS[[3, 0]])


def test_only_the_data_sets_own_npy_goes_without_ids(tmp_path: Path) -> None:
    spec = {"modality": "text", "backend": "precomputed", "format": "npy"}
    assert extractors.parse_extractor("mine", spec, "extractors.mine").needs() == {"items", "vectors"}
    with pytest.raises(UserError, match=r"an \.npy file needs it; MicroLens' own need format: microlens"):
        extractors.parse_extractor("mine", spec | {"path": "x.npy"}, "extractors.mine")
    with pytest.raises(UserError, match=r"belongs to an \.npy file"):
        extractors.parse_extractor("mine", spec | {"format": "microlens", "ids": "ids.txt"}, "extractors.mine")


def test_a_folder_of_parquet_parts_is_one_file(tmp_path: Path) -> None:
    data = {"path": "parts", "id_column": "asin", "vector_column": "vector"}
    files(tmp_path)
    table = pq.read_table(tmp_path / "lists.parquet")
    (tmp_path / "parts").mkdir()
    for number in range(len(IDS)):
        pq.write_table(table.slice(number, 1), tmp_path / f"parts/part-{number}.parquet")
    spec = spec_of(tmp_path, data)
    assert spec.kind == "parquet" and np.array_equal(encode(tmp_path, data).embedding, EXPECTED)
    before = spec.identity()
    pq.write_table(table.slice(0, 0), tmp_path / "parts/part-9.parquet")
    after = spec_of(tmp_path, data).identity()
    assert before["vectors_sha256"] != after["vectors_sha256"] and before["format"] == after["format"] == "parquet"
    other = table.slice(0, 1).set_column(1, "vector", pa.array([[1.0, 2.0]]))
    pq.write_table(other, tmp_path / "parts/part-8.parquet")
    with pytest.raises(UserError, match=r"part-8\.parquet, row 0: vector = .* has 2 numbers, those before it 3"):
        encode(tmp_path, data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="needs one of parquet, npy"):
        spec_of(tmp_path, {"path": "empty"})


def test_a_header_of_the_ids_is_suspected(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    (tmp_path / "ids.txt").write_text("\n".join(["item_id", *IDS]))
    with pytest.raises(UserError, match=r"5 ids, but .* has 4 rows; .* if the first line, 'item_id', is a header"):
        encode(tmp_path, {"path": "v.npy", "ids": str(tmp_path / "ids.txt")})


def test_ids_that_do_not_meet_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = files(tmp_path, ids=[name.lower() for name in IDS])["npy"]
    assert set(encode(tmp_path, data).status) == {"missing"}
    shown = "Ids of the items: 'B000000001', 'B000000002', 'B000000009'; of the file: 'b000000003', 'b000000001'"
    assert "v.npy: none of the 4 items is in it" in caplog.text and shown in caplog.text


def test_another_kind_of_file_says_what_to_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save other vectors as Parquet with the columns item_id and embedding"):
        spec_of(tmp_path, {"path": "vectors.pt"})
