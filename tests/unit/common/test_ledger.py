"""The ledger: a file is read once, and a change of it is noticed whatever its times."""

import os
import time
from pathlib import Path

import pytest

from cm3.common import ledger as module
from cm3.common.files import sha256_of
from cm3.common.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.chdir(tmp_path)
    return Ledger(Path("processed/.checksums"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read for their sha256."""
    seen: list[str] = []

    def counted(path: str | os.PathLike[str]) -> str:
        seen.append(str(path))
        return sha256_of(path)

    monkeypatch.setattr(module, "sha256_of", counted)
    return seen


def written(text: str, age: float = 60, name: str = "table.csv") -> Path:
    """Write a file that was modified `age` seconds ago."""
    path = Path(name)
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_an_unchanged_file_is_read_once(ledger: Ledger, reads: list[str]):
    path = written("a")
    assert ledger.sha256(path) == Ledger(ledger.folder).sha256(path) == sha256_of(path)
    assert reads == ["table.csv"]


@pytest.mark.parametrize("age", [3600, 30], ids=["older", "newer"])
def test_a_replaced_file_of_equal_size_is_read_again(ledger: Ledger, age: float):
    path = written("a")
    before = ledger.sha256(path)
    path.unlink()
    written("b", age)
    assert ledger.sha256(path) == Ledger(ledger.folder).sha256(path) == sha256_of(path) != before


def test_another_file_with_the_same_size_and_time_is_read(ledger: Ledger):
    path, other = written("a"), written("b", name="other.csv")
    ledger.sha256(path)
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert ledger.sha256(path) == sha256_of(path)


def test_a_file_of_this_second_is_read_again_by_the_next_run(ledger: Ledger, reads: list[str]):
    path = written("a", age=0)
    ledger.sha256(path)
    Ledger(ledger.folder).sha256(path)
    assert len(reads) == 2


def test_what_the_workflow_made_is_compared_with_its_bytes(ledger: Ledger):
    path = written("made")
    ledger.record(path, "settings 1", (str(path),), {"input": "0"})
    entry = ledger.entry(path)
    assert entry and ledger.unchanged(entry) and entry.inputs == {"input": "0"}
    written("edit", age=120)
    assert not ledger.unchanged(entry)
    ledger.sha256(path)
    assert not ledger.unchanged(ledger.entry(path) or entry), "reading a changed file does not make it the right one"
    written("made", age=240)
    assert ledger.unchanged(entry)


def test_a_part_that_stays_is_not_read_again(ledger: Ledger, reads: list[str]):
    path = written("made")
    ledger.record(path, "settings 1", ("out",))
    ledger.record(path, "settings 2", ("out",))
    assert reads == ["table.csv"] and ledger.entry(path).identity == "settings 2"
    written("edit", age=30)
    ledger.record(path, "settings 2", ("out",))
    assert len(reads) == 2 and ledger.entry(path).sha256 == sha256_of(path)


def test_parts_that_went_are_forgotten(ledger: Ledger):
    for name, output in (("stays", "out"), ("goes", "out"), ("of-another-job", "other")):
        ledger.record(written("x", name=name), "settings 1", (output,))
    ledger.forget_others(("out",), {"stays"})
    assert sorted(entry.path for entry in ledger.entries()) == ["of-another-job", "stays"]


def test_a_file_that_a_reader_refused_is_damaged_until_its_bytes_are_right(ledger: Ledger):
    path = written("made")
    ledger.record(path, "settings 1", (str(path),))
    good = path.stat()
    path.write_text("mad3")
    os.utime(path, ns=(good.st_atime_ns, good.st_mtime_ns))
    assert ledger.mark_damaged(path, "a checksum differs")
    entry = ledger.entry(path)
    assert entry and entry.damaged == "a checksum differs" and not ledger.unchanged(entry)
    written("made", age=10)
    assert ledger.unchanged(entry)
    assert (ledger.entry(path) or entry).damaged == ""


def test_a_file_of_the_user_is_never_marked(ledger: Ledger):
    path = written("mine")
    ledger.sha256(path)
    assert not ledger.mark_damaged(path, "cut")
    assert not ledger.mark_damaged("unknown", "cut")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"path": "table.csv"}', "null"])
def test_a_damaged_entry_is_as_good_as_none(ledger: Ledger, content: str):
    path = written("a")
    ledger.sha256(path)
    (file,) = ledger.folder.glob("*.json")
    file.write_text(content)
    assert list(Ledger(ledger.folder).entries()) == []
    assert Ledger(ledger.folder).sha256(path) == sha256_of(path)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the place of a folder")
    assert Ledger(Path("file/below")).sha256(written("a")) == sha256_of("table.csv")


def test_a_touched_file_is_not_read_again(ledger: Ledger, reads: list[str]):
    path = written("a")
    ledger.record(path, "settings 1", (str(path),))
    with ledger.touching(path):
        os.utime(path)
    assert Ledger(ledger.folder).sha256(path) == ledger.sha256(path) == sha256_of(path)
    entry = ledger.entry(path)
    assert entry and entry.identity == "settings 1" and ledger.unchanged(entry)
    assert reads == [str(path)], "once, for its entry"


def test_a_touch_hides_neither_a_change_nor_damage(ledger: Ledger):
    path = written("a")
    ledger.record(path, "settings 1", (str(path),))
    ledger.mark_damaged(path, "cut")
    with ledger.touching(path):
        os.utime(path)
    entry = ledger.entry(path)
    assert entry and entry.damaged == "cut" and not ledger.unchanged(entry)
    ledger.record(path, "settings 1", (str(path),))
    written("b", age=30)
    with ledger.touching(path):
        os.utime(path)
    entry = ledger.entry(path)
    assert entry and not ledger.unchanged(entry)
    with ledger.touching(written("c", name="of the user.csv")):
        pass
    assert ledger.entry("of the user.csv") is None
