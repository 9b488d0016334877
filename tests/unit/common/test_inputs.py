"""Inputs of a stage: made for what was asked, and unchanged while the stage runs."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repository import ROOT

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.inputs import Watch, check_made_from
from cm3.common.ledger import Ledger
from cm3.common.tables import MADE_FROM, USERS, write_table


def users(path: Path, made_from: dict[str, str] | None = None) -> Path:
    table = pa.table({"user": pa.array([0], pa.int32()), "user_id": ["u"]})
    write_table(path, table, USERS, {MADE_FROM: made_from} if made_from else None)
    return path


def test_a_table_of_other_settings_is_refused(tmp_path: Path):
    table = users(tmp_path / "users.parquet", {"prepare": "aaa", "split": "bbb"})
    check_made_from(table, {"prepare": "aaa", "split": "bbb"})
    check_made_from(table, {"prepare": "aaa"})
    with pytest.raises(
        UserError, match=r"users.parquet: was made with other settings of split .*split bbb, expected ccc"
    ):
        check_made_from(table, {"prepare": "aaa", "split": "ccc"})


def test_a_table_of_an_earlier_release_passes(tmp_path: Path):
    check_made_from(users(tmp_path / "users.parquet"), {"prepare": "aaa"})


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed", "touched"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str):
    path, other = tmp_path / "table", tmp_path / "other"
    path.write_text("a")
    other.write_text("b")
    watch = Watch({"table": path, "absent": tmp_path / "absent"})
    watch.check()
    if change == "rewritten":
        path.write_text("abc")
    elif change == "replaced":
        other.replace(path)
    elif change == "removed":
        path.unlink()
    else:
        os.utime(path, (1, 1))
    with pytest.raises(UserError, match="table: was changed while this stage read it"):
        watch.check()


STAGE = """
import sys
from collections.abc import Callable
from pathlib import Path
from cm3.common.cli import stage
from cm3.common.errors import DamagedFileError
with stage("demo") as call:
    action, source = call.spec["action"], call.inputs["source"]
    call.outputs["out"].write_text("made")
    if action == "replace":
        source.with_name("new").write_text("new")
        source.with_name("new").replace(source)
    if action == "refuse":
        raise DamagedFileError(source, "a checksum differs")
"""


def run(folder: Path, action: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STAGE, "--spec", json.dumps({"action": action}), "--input", "source=processed/in"]
    command += ["--output", "out=processed/out", "--identity", "settings 1, version demo 1", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "processed").mkdir()
    (tmp_path / "processed/in").write_text("source")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stage_enters_its_outputs_in_the_ledger(folder: Path):
    assert run(folder, "none").returncode == 0
    entry = Ledger().entry("processed/out")
    assert entry and entry.identity == "settings 1, version demo 1" and entry.outputs == ("processed/out",)
    assert entry.inputs == {"processed/in": Ledger().sha256("processed/in")}


def test_a_stage_whose_input_changes_fails(folder: Path):
    done = run(folder, "replace")
    assert done.returncode == 1 and "processed/in: was changed while this stage read it" in done.stderr
    assert Ledger().entry("processed/out") is None


def test_a_stage_refuses_a_table_of_other_settings(folder: Path):
    users(folder / "processed/in", {"split": "aaa"})
    done = run(folder, "none", "--expected", json.dumps({"source": {"split": "bbb"}}))
    assert done.returncode == 1 and "was made with other settings of split" in done.stderr
    assert not (folder / "processed/out").exists()


def test_a_stage_marks_a_damaged_input_of_the_workflow(folder: Path):
    done = run(folder, "refuse")
    assert done.returncode == 1 and "processed/in: damaged (a checksum differs); delete it" in done.stderr
    Ledger().record("processed/in", "settings 0", ("processed/in",))
    done = run(folder, "refuse")
    assert done.returncode == 1 and "It is marked: run the same command again, which makes the file anew" in done.stderr
    entry = Ledger().entry("processed/in")
    assert entry and entry.damaged == "a checksum differs"


def test_tables_hold_what_they_were_made_from_in_their_footer(tmp_path: Path):
    table = users(tmp_path / "users.parquet", {"prepare": "aaa"})
    assert json.loads(pq.read_schema(table).metadata[b"made_from"]) == {"prepare": "aaa"}


def folder_in_the_place_of_an_output(folder: Path) -> str:
    (folder / "processed/out").mkdir()
    return "processed/out: is a folder where a file is expected"


def dangling_link_in_the_place_of_the_log_folder(folder: Path) -> str:
    (folder / "logs").symlink_to("/nowhere")
    return "logs: is a symbolic link to /nowhere, which does not exist"


def file_in_the_place_of_the_log_folder(folder: Path) -> str:
    (folder / "logs").write_text("")
    return "logs: is a file where a folder is expected"


@pytest.mark.parametrize(
    "fault",
    [
        folder_in_the_place_of_an_output,
        dangling_link_in_the_place_of_the_log_folder,
        file_in_the_place_of_the_log_folder,
    ],
)
def test_a_path_of_the_wrong_kind_is_named_in_one_line(folder: Path, fault: Callable[[Path], str]):
    message = fault(folder)
    done = run(folder, "none", "--log", "logs/demo.log")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_error_about_a_damaged_file_passes_between_processes():
    error = DamagedFileError("table.parquet", "cut")
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.reason, str(again)) == (error.path, error.reason, str(error))
