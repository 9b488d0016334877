"""Undocumented parts of Snakemake that the workflow uses still work as `workflow/snakemake_internals.py` expects.

A failure here after an update of Snakemake is to be fixed in that file alone.
"""

import json
import os
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

SNAKEFILE = """
import json
from pathlib import Path
from workflow.snakemake_internals import (
    config_files, has_local_files, literal_path, resource_limit, runs_elsewhere, store_metadata_with_data
)

store_metadata_with_data()

def seen(wildcards):
    facts = {
        "files": [path.name for path in config_files(workflow)],
        "elsewhere": runs_elsewhere(workflow),
        "local": has_local_files(workflow),
        "limits": [resource_limit(workflow, name) for name in ("_cores", "gpu", "other")],
    }
    Path("facts.json").write_text(json.dumps(facts))
    return 1

rule one:
    input: lambda wildcards: [literal_path(path) for path in config.get("inputs", [])]
    output: "processed/{name}.txt"
    threads: seen
    params:
        identity=lambda wildcards: "settings 0, version " + config.get("version", "one 1"),
        arguments=lambda wildcards, output: config.get("arguments", "none"),
    shell: "echo {params.arguments} > {output}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "first.yaml").write_text("version: one 1\n")
    return tmp_path


def run(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run Snakemake and return what it printed and what the Snakefile saw."""
    command = [sys.executable, "-m", "snakemake", "--cores", "3", "--resources", "gpu=2"]
    command += ["--rerun-triggers", "params", "input", "mtime", *options, "--", "processed/a.txt"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = folder / "facts.json"
    return done.stdout + done.stderr, json.loads(facts.read_text()) if facts.exists() else {}


def test_the_snakefile_sees_config_files_limits_and_where_jobs_run(folder: Path):
    _, facts = run(folder, "-n", "--configfile", "first.yaml")
    assert facts == {"files": ["first.yaml"], "elsewhere": True, "local": True, "limits": [3, 2, None]}
    _, facts = run(folder)
    assert facts == {"files": [], "elsewhere": False, "local": True, "limits": [3, 2, None]}


def test_targets_are_added_to_those_of_the_command_line(folder: Path):
    (folder / "Snakefile").write_text(
        SNAKEFILE
        + "\nfrom workflow.snakemake_internals import extend_targets\n"
        + "extend_targets(workflow, lambda targets: [t.replace('a.txt', 'b.txt') for t in targets])\n"
    )
    run(folder)
    assert (folder / "processed/a.txt").exists() and (folder / "processed/b.txt").exists()
    printed, _ = run(folder)
    assert "Nothing to be done" in printed


def test_braces_in_an_input_are_not_wildcards(folder: Path):
    paths = ["a{2020}.csv", "{name}/x.csv", "b{x,[0-9]+}{{y}}.csv", "plain.csv"]
    (folder / "inputs.yaml").write_text(f"inputs: {json.dumps(paths)}\n")
    (folder / "{name}").mkdir()
    for path in paths:
        (folder / path).touch()
    run(folder, "--configfile", "inputs.yaml")
    assert "Nothing to be done" in run(folder, "-n", "--configfile", "inputs.yaml")[0]
    (folder / paths[1]).write_text("changed")
    assert "one" in run(folder, "-n", "--configfile", "inputs.yaml")[0].split("Job stats:")[1]


def test_records_are_stored_with_the_data_and_hold_the_identity_alone(folder: Path):
    run(folder)
    name = urlsafe_b64encode(b"processed/a.txt").decode()
    record = json.loads((folder / "processed/.snakemake-metadata" / name).read_text())
    assert record["params"] == ["'settings 0, version one 1'"]
    assert record["rule"] == "one" and "echo none" in record["shellcmd"]


def test_the_identity_reruns_a_job_and_its_arguments_do_not(folder: Path):
    run(folder)
    assert "Nothing to be done" in run(folder, "-n", "--config", "arguments=other")[0]
    assert "params have changed" in run(folder, "-n", "--config", "version='one 2'")[0]


def test_a_file_next_to_the_records_does_not_disturb_snakemake(folder: Path):
    run(folder)
    (folder / "processed/.snakemake-metadata/.versions").write_text("{}")
    assert "Nothing to be done" in run(folder, "-n")[0]
