"""A stage's command line: what it hands over, what it records, and how it ends."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from repository import ROOT

from cm3.common.cli import versions

STAGE = """
import sys, time
from cm3.common.cli import stage
from cm3.common.errors import UserError
with stage("demo") as call:
    print(call.spec, call.runtime, sorted(call.inputs), flush=True)
    call.record["rows"] = 3
    if call.spec.get("fail"):
        raise UserError("rows.csv, line 4: 'x' is not a number; mend the line")
    time.sleep(call.spec.get("sleep", 0))
"""


def start(tmp_path: Path, spec: dict, **environment: str) -> subprocess.Popen[str]:
    outputs = ["--output", f"out={tmp_path / 'out'}", "--output", f"record={tmp_path / 'record.json'}"]
    command = [sys.executable, "-c", STAGE, "--spec", json.dumps(spec), "--input", "features.text=a=b", *outputs]
    return subprocess.Popen(
        [*command, "--log", str(tmp_path / "logs/demo.log"), "--code", "abc", "--library", "pyarrow"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def test_it_records_time_memory_code_and_versions(tmp_path: Path):
    process = start(tmp_path, {"a": 1})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == "{'a': 1} {} ['features.text']\n"
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["rows"] == 3
    assert record["code"] == "abc"
    assert record["wall_seconds"] > 0
    # The kernel counts the memory of this process at the start into the peak of the other one.
    own_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    assert 5 < record["peak_memory_mb"] < 2000 + own_mb
    assert record["versions"].keys() == {"python", "pyarrow"}
    assert record["device"] == "cpu" and record["threads"] == os.cpu_count()
    assert "demo: done" in (tmp_path / "logs/demo.log").read_text()


def test_the_record_has_the_libraries_of_the_stage(tmp_path: Path):
    record = tmp_path / "record.json"
    code = STAGE.replace('"demo"', '"cm3.datasets.label"').replace(
        'call.record["rows"] = 3', 'call.record |= {"device": "cuda", "threads": 7}'
    )
    subprocess.run([sys.executable, "-c", code, "--output", f"record={record}"], cwd=ROOT, check=True)
    found = json.loads(record.read_text())
    assert found["versions"].keys() == {"python", "numpy", "pyarrow"}
    assert (found["device"], found["threads"]) == ("cuda", 7)


def test_only_jobs_of_the_workflow_without_a_gpu_see_none(tmp_path: Path):
    code = f"import os\n{STAGE}    print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    seen = {}
    for told in ({"gpus": 0}, {}):
        done = subprocess.run(
            [sys.executable, "-c", code, "--runtime", json.dumps(told), "--output", f"out={tmp_path / 'out'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
        )
        assert done.returncode == 0, done.stderr
        seen[bool(told)] = done.stdout.splitlines()[-1]
    assert seen == {True: "", False: "0"}


def test_a_user_error_is_one_line_without_traceback(tmp_path: Path):
    process = start(tmp_path, {"fail": True})
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.strip().endswith("demo: rows.csv, line 4: 'x' is not a number; mend the line")
    assert "Traceback" not in err
    assert not (tmp_path / "record.json").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path):
    process = start(tmp_path, {"sleep": 600})
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; run the same command again to go on" in err
    assert "Traceback" not in err


def test_it_ends_with_its_killed_parent(tmp_path: Path):
    shell = (
        f"{sys.executable} -c '{STAGE.replace(chr(39), chr(34))}' "
        f"--spec '{json.dumps({'sleep': 600})}' --output out={tmp_path / 'out'}"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['bash', '-c', {('exec ' + shell)!r}])"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"CM3_STOP_WITH_PARENT": "1"},
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.kill()
    started = time.monotonic()
    parent.stdout.read()  # ends when the stage, which holds the other end, is gone
    assert time.monotonic() - started < 300


def test_a_call_too_long_for_a_command_line_comes_as_a_file(tmp_path: Path):
    inputs = {f"evaluation.shop.{number}": f"results/{number}" for number in range(20_000)}
    call = {
        "spec": {"a": 1},
        "runtime": {"threads": 2},
        "inputs": inputs,
        "code": "abc",
        "outputs": {"out": str(tmp_path / "out"), "record": str(tmp_path / "nowhere/record.json")},
    }
    (tmp_path / "call.json").write_text(json.dumps(call))
    code = STAGE.replace("sorted(call.inputs)", "len(call.inputs), call.inputs['evaluation.shop.7']")
    places = ["--root", "/storage/bucket", "--output", f"record={tmp_path / 'record.json'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "--call", str(tmp_path / "call.json"), *places],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'a': 1} {'threads': 2} 20000 /storage/bucket/results/7\n"
    assert json.loads((tmp_path / "record.json").read_text())["code"] == "abc"


def test_versions_name_what_is_installed_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    there = {"torch": "1", "torchvision": "2", "tokenizers": "3", "vllm": "4"}

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    found = versions(["torch", "torchvision", "tokenizers", "vllm", "timm"])
    assert found.keys() == {"python", *there} and found.items() >= there.items()


def test_a_job_of_the_workflow_logs_to_its_file_alone(tmp_path: Path):
    code = STAGE + "    print('of a library', file=sys.stderr)\n    raise ValueError('a bug')\n"
    code = "import sys\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, "--log", str(tmp_path / "logs/job.log")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CM3_LOG_TO_FILE": "1"},
    )
    log = (tmp_path / "logs/job.log").read_text()
    assert done.returncode == 1 and done.stderr == ""
    assert "of a library" in log and "ERROR stage: demo: ValueError: a bug\nTraceback" in log
    assert log.count("a bug") == 2  # the message and the end of the traceback: no line is written twice


MODULE = """
import atexit, subprocess, sys
import cm3.common.cli
class Torn:
    def __del__(self):
        print("torn down", flush=True)
kept = Torn()
def main():
    with cm3.common.cli.stage(NAME) as call:
        atexit.register(print, "handler")
        if call.spec.get("child"):
            subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if call.spec.get("late"):
        raise ValueError("after the stage")
    print("unflushed", end="")
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("spec", "name", "torn"),
    [({}, "quick", False), ({"child": True}, "quick", True), ({"late": True}, "quick", True), ({}, "other", True)],
)
def test_a_stage_that_succeeds_ends_without_teardown(tmp_path: Path, spec: dict, name: str, torn: bool):
    """Exit handlers run and output is flushed; a child process, an error or another main module end it as usual."""
    (tmp_path / "quick.py").write_text(MODULE.replace("NAME", repr(name)))
    command = [sys.executable, "-m", "quick", "--spec", json.dumps(spec), "--log", str(tmp_path / "log")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == bool(spec.get("late")), done.stderr
    assert ("torn down" in done.stdout) == torn
    assert "handler" in done.stdout and ("unflushed" in done.stdout) != bool(spec.get("late"))
    assert f"{name}: done" in (tmp_path / "log").read_text()
