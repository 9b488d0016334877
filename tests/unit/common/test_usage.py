"""Time and memory of jobs of several processes, and of jobs that were killed and resumed."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cm3.common import usage as module
from cm3.common.usage import Usage, memory_of_tree_mb, peak_memory_mb


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)


def test_a_job_that_ends_well_leaves_no_note(tmp_path: Path):
    with Usage(tmp_path / "note", "job 1") as usage:
        time.sleep(0.2)
        facts = usage.facts()
    assert 0.2 <= facts["wall_seconds"] < 600
    assert 5 < facts["peak_memory_mb"] < 10_000
    assert "resumes" not in facts
    assert not (tmp_path / "note").exists()


def test_pieces_of_one_job_are_added(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(RuntimeError), Usage(tmp_path / "note", "job 1"):
            time.sleep(0.3)
            raise RuntimeError
    with Usage(tmp_path / "note", "job 1") as usage:
        time.sleep(0.3)
        facts = usage.facts()
    assert facts["wall_seconds"] >= 0.9
    assert facts["resumes"] == 2


def test_a_killed_piece_counts(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from cm3.common import usage as module\n"
        "module.MEASURE_SECONDS, module.SAVE_SECONDS = 0.05, 0.0\n"
        "with module.Usage(Path(sys.argv[1]), 'job 1'):\n    time.sleep(600)"
    )
    note = tmp_path / "note"
    process = subprocess.Popen([sys.executable, "-c", code, str(note)])
    while not note.exists() or json.loads(note.read_text())["wall_seconds"] < 0.3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = json.loads(note.read_text())["wall_seconds"]
    assert saved > 0.3
    with Usage(note, "job 1") as usage:
        facts = usage.facts()
    assert facts["wall_seconds"] >= saved and facts["resumes"] == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"identity": "job 1"}', '{"identity": "job 2", "wall_seconds": 9000}']
)
def test_a_note_of_another_job_or_a_damaged_one_counts_for_nothing(tmp_path: Path, content: str):
    (tmp_path / "note").write_text(content)
    with Usage(tmp_path / "note", "job 1") as usage:
        assert usage.facts()["wall_seconds"] < 9000


def test_the_memory_of_children_counts(monkeypatch: pytest.MonkeyPatch):
    measured = threading.Event()

    def watched() -> float:
        memory = memory_of_tree_mb()
        if memory > 400 and threading.current_thread() is not threading.main_thread():
            measured.set()
        return memory

    monkeypatch.setattr(module, "memory_of_tree_mb", watched)
    before = peak_memory_mb()
    code = "x = b'1' * 400_000_000; print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    with Usage(None, "job") as usage:
        child.stdout.readline()
        assert memory_of_tree_mb() > 400
        assert measured.wait(120), "measured while the job runs"
        child.communicate(b"\n")
        assert usage.facts()["peak_memory_mb"] >= max(400, before)
