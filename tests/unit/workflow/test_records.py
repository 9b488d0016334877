"""Snakemake's records follow what the ledger says of the outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

from cm3.common.ledger import Ledger
from workflow.records import check_outputs
from workflow.snakemake_internals import METADATA, record_path

IDENTITY = "settings 1, version split 1"


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.chdir(tmp_path)
    METADATA.mkdir(parents=True)
    return Ledger()


def made(ledger: Ledger, *names: str, parts: tuple[str, ...] = ()) -> None:
    """Write outputs and parts of one job, and enter them."""
    outputs = tuple(f"processed/{name}" for name in names)
    for path in (*outputs, *(f"processed/{name}" for name in parts)):
        Path(path).write_text(f"content of {path}")
        ledger.record(path, IDENTITY, outputs, {"processed/in": "0" * 64})
    for path in outputs:
        record_path(path).write_text(
            json.dumps({"params": [repr(IDENTITY)], "rule": "split", "record_format_version": 6})
        )


def record(name: str) -> dict[str, Any]:
    return json.loads(record_path(f"processed/{name}").read_text())


def test_unchanged_outputs_keep_their_records(ledger: Ledger):
    made(ledger, "a", "b")
    before = record("a")
    assert check_outputs(ledger) == []
    assert record("a") == before


def test_a_changed_output_makes_its_job_run_again_until_it_is_restored(ledger: Ledger):
    made(ledger, "a", "b")
    Path("processed/b").write_text("edited")
    (warning,) = check_outputs(ledger)
    assert warning.startswith("processed/b is not the file that the workflow made")
    assert record("b")["params"] != [repr(IDENTITY)] and record("b")["rule"] == "split"
    Path("processed/b").write_text("content of processed/b")
    assert check_outputs(ledger) == []
    assert record("b")["params"] == [repr(IDENTITY)]


def test_a_changed_or_absent_part_makes_the_job_run_again(ledger: Ledger):
    made(ledger, "a", parts=("shard",))
    Path("processed/shard").unlink()
    assert len(check_outputs(ledger)) == 1
    assert record("a")["params"] != [repr(IDENTITY)]


def test_an_absent_output_is_left_to_snakemake(ledger: Ledger):
    made(ledger, "a", "b")
    Path("processed/a").unlink()
    assert check_outputs(ledger) == []
    assert record("b")["params"] == [repr(IDENTITY)]


def test_deleted_outputs_are_forgotten_with_their_parts(ledger: Ledger):
    made(ledger, "a", parts=("shard",))
    for name in ("a", "shard"):
        Path(f"processed/{name}").unlink()
    assert check_outputs(ledger) == []
    assert list(ledger.entries()) == []


@pytest.mark.parametrize("content", [None, "", '{"params": ["'])
def test_a_lost_record_is_restored(ledger: Ledger, content: str | None):
    made(ledger, "a")
    record_path("processed/a").unlink()
    if content is not None:
        record_path("processed/a").write_text(content)
    assert check_outputs(ledger) == []
    assert record("a")["params"] == [repr(IDENTITY)]
    assert record("a")["input_checksums"] == {"processed/in": f"sha256:{'0' * 64}"}


def test_an_unreadable_record_of_an_unknown_output_makes_it_again(ledger: Ledger):
    record_path("processed/old").write_text("")
    check_outputs(ledger)
    assert record("old")["params"] == ["'the record of this output was damaged'"]
