"""Publishing: the selected run's files under the experiment's own name, and the one metrics.json."""

import shutil
from pathlib import Path
from typing import Any

from cm3.common.cli import stage
from cm3.common.files import atomic, read_json, write_json


def publish(provenance: dict[str, Any], files: dict[str, Path], outputs: dict[str, Path]) -> None:
    """Copy a run's files to `outputs`, and gather its metrics with everything they came from in one JSON.

    Args:
        provenance: experiment, dataset, command, config and keys.
        files: the run's files by name; `evaluation`, `stats` and `record.STAGE` are gathered, others copied.
        outputs: where to copy each file; `metrics` is the JSON.
    """
    for name, path in outputs.items():
        if name != "metrics":
            with atomic(path) as temporary:
                shutil.copyfile(files[name], temporary)
    records = {name.removeprefix("record."): read_json(p) for name, p in files.items() if name.startswith("record.")}
    write_json(
        outputs["metrics"], gather(provenance, read_json(files["evaluation"]), read_json(files["stats"]), records)
    )


def gather(
    provenance: dict[str, Any], evaluation: dict[str, Any], stats: dict[str, Any], records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return metrics.json: a warning where there is one, metrics, then data, coverage and training, then time, memory and provenance."""
    train = records["train"]
    extractions = {n.removeprefix("extract."): r for n, r in records.items() if n.startswith("extract.")}
    return {
        **({"warning": train["warning"]} if "warning" in train else {}),
        "experiment": provenance["experiment"],
        "dataset": provenance["dataset"],
        "command": provenance["command"],
        **evaluation,
        "coverage": {modality: record["counts"] for modality, record in extractions.items()},
        "data": stats,
        "raw": records["prepare"].get("raw", {}),
        "training": {name: value for name, value in train.items() if name not in _OF_EVERY_STAGE},
        "stages": {
            name: {field: record[field] for field in ("wall_seconds", "peak_memory_mb", "code")}
            for name, record in records.items()
        },
        "config": provenance["config"],
        "keys": provenance["keys"],
        "versions": train["versions"],
    }


_OF_EVERY_STAGE = frozenset({"stage", "started", "wall_seconds", "peak_memory_mb", "code", "versions"})


def main() -> None:
    """Run the stage from the command line."""
    with stage("workflow.publish") as call:
        publish(call.spec, call.inputs, call.outputs)


if __name__ == "__main__":
    main()
