"""Undocumented parts of Snakemake that the workflow uses still work as `workflow/snakemake_internals.py` expects.

A failure here after an update of Snakemake is to be fixed in that file alone.
"""

import json
import os
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from forked_snakemake import forked_snakemake
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
    arguments = ["--cores", "3", "--resources", "gpu=2", "--rerun-triggers", "params", "input", "mtime"]
    arguments += [*options, "--", "processed/a.txt"]
    status = forked_snakemake(folder, arguments, os.environ | {"PYTHONPATH": str(ROOT)}, folder / "printed")
    printed = (folder / "printed").read_text()
    assert status == 0, printed
    facts = folder / "facts.json"
    return printed, json.loads(facts.read_text()) if facts.exists() else {}


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


def test_an_output_that_snakemake_touches_keeps_its_entry_in_the_ledger(tmp_path: Path):
    (tmp_path / "Snakefile").write_text(
        """
from cm3.common.ledger import Ledger
from workflow.snakemake_internals import keep_entries_of_touched_files, store_metadata_with_data

store_metadata_with_data()
keep_entries_of_touched_files(Ledger())

rule one:
    output: "processed/{name}.txt"
    run:
        Path(output[0]).write_text("a")
        os.utime(output[0], (1, 1))
        Ledger().record(output[0], "settings 0", (output[0],))
"""
    )
    run(tmp_path)
    status = (tmp_path / "processed/a.txt").stat()
    assert status.st_mtime > 1, "Snakemake has touched it"
    (entry,) = (json.loads(path.read_text()) for path in (tmp_path / "processed/.checksums").glob("*.json"))
    assert (entry["mtime_ns"], entry["inode"]) == (status.st_mtime_ns, status.st_ino)


TERMINAL = """
import logging
from workflow.snakemake_internals import (
    config_overrides, executes_jobs, has_cluster, log_file, planned_jobs, replace_terminal_output, shows_commands, targets
)

class Seen(logging.Handler):
    def emit(self, record):
        print("SEEN", getattr(record, "event", None), executes_jobs(workflow), file=__import__("sys").stderr)

def made(original):
    print("NAME", original.name, shows_commands(workflow), config_overrides(workflow))
    return Seen()

replace_terminal_output(workflow, made)

onstart:
    print("JOBS", planned_jobs(workflow), targets(workflow), bool(log_file(workflow)), has_cluster(workflow))

rule one:
    output: "processed/{name}.txt"
    shell: "touch {output}"
"""


def test_the_terminal_output_can_be_replaced(folder: Path):
    (folder / "Snakefile").write_text(TERMINAL)
    words = "experiments={a: {lr: 0.1}}"
    printed, _ = run(folder, "-p", "--config", words)
    assert f"NAME DefaultStreamHandler True ['{words}']" in printed
    assert "JOBS [('one', {'name': 'a'})] ['processed/a.txt'] True False" in printed
    for event in ("run_info", "job_info", "job_finished"):
        assert f"SEEN {event} True" in printed
    assert "rule one:" not in printed
    (folder / "processed/a.txt").unlink()
    assert "SEEN run_info False" in run(folder, "-n")[0]
    assert "rule one:" in run(folder, "--verbose")[0]
