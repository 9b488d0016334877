"""Damaged files are noticed by their readers, whatever is wrong with them; files of earlier releases are read."""

import importlib
import json
import random
import resource
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from repository import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cm3.common.checksums import check_parquet
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.files import atomic, exclusive, read_json, write_json
from cm3.common.tables import SIMILARITY, USERS, open_parquet, read_metadata, read_parquet, read_table, write_table
from cm3.common.tensors import open_tensors, read_tensors, write_tensors


def test_no_damage_of_any_kind_of_file_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    counts = importlib.import_module("damage").measure(tmp_path, 200, seed=1)
    total = sum(counts.values(), Counter())
    assert total["silent"] == total["traceback"] == 0, counts
    assert all(found["noticed"] + found["repaired"] for found in counts.values())


def graph(rows: int = 500) -> pa.Table:
    draw = np.random.default_rng(0)
    columns = {"item": np.arange(rows) // 5, "neighbour": draw.integers(0, rows, rows), "score": draw.random(rows)}
    return pa.table(columns).cast(SIMILARITY)


def test_every_bit_of_the_headers_and_the_footer_of_a_parquet_file_counts(tmp_path: Path):
    path, draw = tmp_path / "t.parquet", random.Random(0)
    write_table(path, graph(), SIMILARITY, {"seed": 42})
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little") + 8
    places = [*range(len(content) - size - 200, len(content)), *range(4, 40)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"t\.parquet: damaged"):
            read_table(path, SIMILARITY)


def test_other_programs_read_parquet_files_with_checksums(tmp_path: Path):
    path = tmp_path / "t.parquet"
    write_table(path, graph(), SIMILARITY, {"seed": 42})
    assert pq.read_table(path, page_checksum_verification=True).equals(graph())
    assert duckdb.sql(f"select count(*), sum(item) from '{path}'").fetchall() == [(500, 24750)]
    assert read_metadata(path) == {"seed": 42}


def test_parquet_files_of_many_pages_empty_tables_and_nested_columns_have_checksums(tmp_path: Path):
    schema = pa.schema([("words", pa.list_(pa.string())), ("n", pa.int64()), ("flag", pa.bool_())])
    for rows in (0, 1, 300_000):
        table = pa.table(
            {
                "words": [["a", None], None, []] * (rows // 3) + [None] * (rows % 3),
                "n": range(rows),
                "flag": [None] * rows,
            },
            schema,
        )
        write_table(tmp_path / "t", table, schema)
        check_parquet(tmp_path / "t")
        assert read_table(tmp_path / "t", schema).equals(table)
        content = bytearray((tmp_path / "t").read_bytes())
        assert b"cm3check" in content
        content[-12] ^= 1
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(DamagedFileError):
            check_parquet(tmp_path / "t")


def test_files_of_earlier_releases_are_read(tmp_path: Path):
    pq.write_table(graph().replace_schema_metadata({"seed": "42"}), tmp_path / "t")
    assert read_table(tmp_path / "t", SIMILARITY).equals(graph()) and read_metadata(tmp_path / "t") == {"seed": 42}
    save_file({"a": torch.ones(3)}, tmp_path / "m", {"cm3": '{"epoch": 3}'})
    tensors, metadata = read_tensors(tmp_path / "m")
    assert tensors["a"].tolist() == [1, 1, 1] and metadata == {"epoch": 3}
    (tmp_path / "r.json").write_text('{"a": [1.5, null], "é": "x"}')
    assert read_json(tmp_path / "r.json") == {"a": [1.5, None], "é": "x"}


def test_a_damaged_parquet_file_of_an_earlier_release_is_named(tmp_path: Path):
    path, draw, seen = tmp_path / "t", random.Random(0), 0
    pq.write_table(graph(), path)
    content = path.read_bytes()
    for _ in range(300):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            read_table(path, SIMILARITY)
        except UserError as error:
            seen += str(path) in str(error)
    assert seen > 20


def test_some_rows_are_read_batch_by_batch(tmp_path: Path):
    write_table(tmp_path / "t", graph(), SIMILARITY)
    found = read_parquet(tmp_path / "t", ["item", "neighbour"], pc.field("item") == 3)
    assert found.column("neighbour").to_pylist() == graph().column("neighbour").to_pylist()[15:20]
    with pytest.raises(UserError, match="t: has no column price"):
        read_parquet(tmp_path / "t", ["price"])


def test_a_record_that_was_edited_is_noticed_and_its_checksum_is_not_among_its_values(tmp_path: Path):
    path = tmp_path / "train.stage.json"
    write_json(path, {"seed": 42, "numbers": {2: 0.1, 10: 1e-17}, "name": "é"})
    assert read_json(path) == {"seed": 42, "numbers": {"2": 0.1, "10": 1e-17}, "name": "é"}
    path.write_text(json.dumps(json.loads(path.read_text())))  # other white space
    assert read_json(path)["seed"] == 42
    text = path.read_text()
    for changed in (
        text.replace("42", "43"),
        text.replace('"checksum"', '"chfcksum"'),
        text.replace("cm3-sha", "cm2-sha"),
    ):
        path.write_text(changed)
        with pytest.raises(DamagedFileError, match=r"train\.stage\.json: damaged"):
            read_json(path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b'{"a": 1}\0'])
def test_a_record_that_is_not_json_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"r\.json: damaged \(not JSON"):
        read_json(tmp_path / "r.json")


def test_tensors_come_back_with_their_metadata_and_equal_calls_give_equal_bytes(tmp_path: Path):
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.ones(2, dtype=torch.bfloat16),
        "step": torch.tensor(3.0),
        "none": torch.empty(0),
    }
    for name in "xy":
        write_tensors(tmp_path / name, tensors, {"z": [1.5], "a": {"b": None}})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found, metadata = read_tensors(tmp_path / "x")
    assert metadata == {"z": [1.5], "a": {"b": None}} and list(metadata) == ["z", "a"]
    assert all(torch.equal(found[name], load_file(tmp_path / "x")[name]) for name in tensors)
    lazy, same = open_tensors(tmp_path / "x")
    assert same == metadata and set(lazy) == set(tensors) and len(lazy) == 4 and "c" not in lazy
    assert all(torch.equal(lazy[name], found[name]) for name in lazy)
    with safe_open(tmp_path / "x", "pt") as file:
        assert list(json.loads(file.metadata()["cm3"])) == ["z", "a", "checksum"]


READERS = {
    "table": lambda path: read_table(path, USERS),
    "footer": lambda path: read_metadata(path),
    "tensors": lambda path: read_tensors(path),
    "record": lambda path: read_json(path),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_absent_files_folders_and_files_without_permission_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read
):
    with pytest.raises(UserError, match="absent: no such file") as found:
        read(tmp_path / "absent")
    assert not isinstance(found.value, DamagedFileError)
    with pytest.raises(UserError, match="is a folder, but a file is expected here"):
        read(tmp_path)
    (tmp_path / "x").write_bytes(b"x")

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr("io.open", refused)
    with pytest.raises(UserError, match=r"x: cannot be read \(Permission denied\); check the permissions") as found:
        read(tmp_path / "x")
    assert not isinstance(found.value, DamagedFileError)


def written(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text("x")


def locked(path: Path) -> None:
    with exclusive(path):
        pass


@pytest.mark.parametrize("write", [written, locked, lambda path: write_json(path, {})], ids=["file", "lock", "record"])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, write):
    with pytest.raises(UserError, match=r"/proc/x/out: cannot be written .*check the permissions of the file"):
        write(Path("/proc/x/out"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        write(tmp_path / "file/out")
    (tmp_path / "out/folder").mkdir(parents=True)
    with pytest.raises(UserError, match="out: is a folder, but a file is expected here"):
        write(tmp_path / "out")
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
        and (tmp_path / "file").read_text() == "mine"
    )


def test_errors_about_other_files_are_not_taken_for_one_of_the_file_that_is_written(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent"), atomic(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_tensors_are_written_is_one_line(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"m: file too large\. Nothing half-written was kept; make room"):
            write_tensors(tmp_path / "m", {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_the_body_raises_while_it_reads_is_not_damage(tmp_path: Path):
    write_table(tmp_path / "t", graph(), SIMILARITY)
    with pytest.raises(KeyError), open_parquet(tmp_path / "t"):
        raise KeyError("x")
