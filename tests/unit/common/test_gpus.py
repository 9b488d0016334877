"""Jobs that run at once get GPUs of their own, and a killed one gives its GPU back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT

from cm3.common import gpus
from cm3.common.gpus import gpu_here, own_gpus, visible_gpus

HOLD = """
import os, sys, time
from pathlib import Path
from cm3.common import gpus
gpus.SHARED_FOLDER = Path(os.environ["SHARED"])
with gpus.own_gpus(float(os.environ.get("WANTED", 1))) as held:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == held[0]
    print(*held, flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists GPUs 0 and 1."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SHARED", str(tmp_path))
    monkeypatch.setattr(gpus, "SHARED_FOLDER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def start(seconds: float, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(seconds)], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def reported(job: subprocess.Popen[str]) -> str:
    assert job.stdout is not None
    return job.stdout.readline().strip()


def test_jobs_at_once_hold_different_gpus():
    jobs = [start(600), start(600)]
    held = [reported(job) for job in jobs]
    assert sorted(held) == ["0", "1"]
    third = start(0)
    time.sleep(0.5)
    assert third.poll() is None
    jobs[0].send_signal(signal.SIGKILL)
    assert reported(third) == held[0]
    jobs[1].kill()
    for job in (*jobs, third):
        job.wait(300)


def test_jobs_with_temporary_folders_of_their_own_share_the_gpus(tmp_path: Path):
    jobs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jobs.append(start(600, TMPDIR=str(tmp_path / name)))
    assert sorted(reported(job) for job in jobs) == ["0", "1"]
    for job in jobs:
        job.kill()
        job.wait(300)


def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch):
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,3")
    with own_gpus(1) as first:
        assert first == ["GPU-abc"] and os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-abc,3"


def test_zero_hides_all_gpus_and_none_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    with own_gpus(0) as none:
        assert none == [] and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with own_gpus(None) as none:
        assert none == [] and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    # Where no GPU is known of, and the planner thus asks for none, one that shows itself to torch stays.
    monkeypatch.setattr(gpus, "gpu_here", lambda: False)
    with own_gpus(0):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_machine_without_gpus_waits_for_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with own_gpus(1) as gpus:
        assert gpus == []


def test_a_job_that_wants_several_gets_all_or_waits():
    with own_gpus(5) as both:
        assert both == ["0", "1"] and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        waiting = start(0)
        time.sleep(0.5)
        assert waiting.poll() is None
    assert reported(waiting) in ("0", "1"), "whichever is given back first"
    waiting.wait(300)


def ended(*jobs: subprocess.Popen[str]) -> None:
    for job in jobs:
        job.kill()
        job.wait(300)


def test_jobs_with_shares_fill_one_gpu_and_leave_the_other_whole():
    quarters = [start(600, WANTED="0.25") for _ in range(4)]
    assert {reported(job) for job in quarters} == {"0"}, "all on one GPU"
    fifth = start(600, WANTED="0.25")
    assert reported(fifth) == "1"
    whole = start(0)
    time.sleep(0.7)
    assert whole.poll() is None
    ended(fifth)
    assert reported(whole) == "1"
    whole.wait(300)
    ended(*quarters)


def test_a_share_waits_for_room_and_a_killed_job_gives_its_share_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    first, second = start(600, WANTED="0.5"), start(600, WANTED="0.4")
    assert reported(first) == reported(second) == "0"
    third = start(0, WANTED="0.2")
    time.sleep(1)
    assert third.poll() is None, "0.1 is left"
    small = start(0, WANTED="0.1")
    assert reported(small) == "0"
    first.send_signal(signal.SIGKILL)
    assert reported(third) == "0"
    small.wait(300)
    third.wait(300)
    ended(first, second)


def test_three_jobs_with_a_third_each_share_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with own_gpus(0.33) as a, own_gpus(0.34) as b, own_gpus(1 / 3) as c:
        assert a == b == c == ["1"] and os.environ["CM3_ALLOTTED_GPUS"] == "1"
        waiting = start(0)
        time.sleep(0.7)
        assert waiting.poll() is None
    assert reported(waiting) == "1"
    waiting.wait(300)


def test_a_share_is_of_the_gpu_by_its_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two jobs of a scheduler that hides the other GPUs: each one's GPU has the id 0."""
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nprintf '0, GPU-a\\n'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with own_gpus(1):
        (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nprintf '0, GPU-b\\n'\n")
        with own_gpus(0.5) as held:
            assert held == ["0"]
        waiting = start(0, WANTED="0.5")
        assert reported(waiting) == "0"
        waiting.wait(300)


@pytest.mark.parametrize(("device", "there"), [("nvidia0", True), ("kfd", True), ("nvidiactl", False), ("null", False)])
def test_whether_there_is_a_gpu_is_seen_without_asking_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: bool
):
    assert gpu_here(), "an nvidia-smi is there"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(gpus, "DEVICE_FOLDER", tmp_path)
    (tmp_path / device).touch()
    assert gpu_here() == there
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gpu_here()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_here()
