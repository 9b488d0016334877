"""Publishing: copies of the selected run's files, and metrics.json with everything that its numbers come from."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3.common.checksums import check_tensors
from cm3.common.cli import stage, versions
from cm3.common.errors import DamagedFileError
from cm3.common.files import atomic, file_error, read_json, sha256_of, write_json
from cm3.common.stages import STAGES
from cm3.common.tables import open_parquet
from cm3.evaluation.recommendations import has_numbers, publish_recommendations, read_ids


def publish(provenance: dict[str, Any], files: dict[str, Path], outputs: dict[str, Path]) -> None:
    """Copy a run's files to `outputs`, and collect its metrics, data and provenance in one JSON file.

    The recommendations get ids in place of the numbers of users and items.

    Args:
        provenance: experiment, dataset, command, config, keys, and libraries by record (see `library_warning`).
        files: the run's files by name, and the tables `items` and `users` of its data set; `evaluation`, `stats` and
            `record.STAGE` are collected, others copied.
        outputs: where to copy each file; `metrics` is the JSON file.

    Raises:
        DamagedFileError: a file or record of the run is damaged.
        UserError: the recommendations are of other users or items.
    """
    records = {name.removeprefix("record."): read_json(p) for name, p in files.items() if name.startswith("record.")}
    for name, path in outputs.items():
        if name == "recommendations" and has_numbers(files[name]):
            publish_recommendations(files[name], path, read_ids(files["users"], files["items"]))
        elif name != "metrics":
            _check(files[name], records["train"].get(f"{name}_sha256"))
            with atomic(path) as temporary:
                _copy(files[name], temporary)
    write_json(
        outputs["metrics"], gather(provenance, read_json(files["evaluation"]), read_json(files["stats"]), records)
    )


def _check(path: Path, sha256: str | None) -> None:
    """Raise DamagedFileError if a file of a run is damaged."""
    try:
        if path.suffix == ".parquet":
            with open_parquet(path) as file:
                for _ in file.iter_batches():
                    pass
        elif path.suffix == ".safetensors":
            check_tensors(path)
        elif sha256 not in (None, sha256_of(path)):
            raise DamagedFileError(path, "its content does not match the checksum in the record of its stage")
    except OSError as error:
        raise file_error(path, error) from None


def _copy(source: Path, target: Path) -> None:
    """Copy a file; on file systems that can (Btrfs, XFS, NFS 4.2) the copy shares its blocks and takes no time.

    A hard link would be older than other inputs of the job, which Snakemake refuses.
    """
    try:
        with source.open("rb") as read, target.open("wb") as write:
            while os.copy_file_range(read.fileno(), write.fileno(), 1 << 30):
                pass
    except (OSError, AttributeError):  # not on this file system, or not on this operating system
        shutil.copyfile(source, target)


def gather(
    provenance: dict[str, Any], evaluation: dict[str, Any], stats: dict[str, Any], records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of metrics.json: warnings, metrics, data, coverage, training, facts of each stage, provenance.

    Args:
        provenance: as for `publish`.
        evaluation: metrics of the run.
        stats: statistics of the data.
        records: the stages' records: prepare, split, train, evaluate, extract.MODALITY, ...
    """
    train = records["train"]
    extractions = {n.removeprefix("extract."): r for n, r in records.items() if n.startswith("extract.")}
    reductions = {n.removeprefix("reduce."): r for n, r in records.items() if n.startswith("reduce.")}
    reduced = {
        modality: {fact: record[fact] for fact in ("from", "dim", "explained_variance")}
        for modality, record in reductions.items()
    }
    warnings = [train.get("warning"), library_warning(records, provenance.get("libraries", {}))]
    warning = "; ".join(filter(None, warnings))
    return {
        **({"warning": warning} if warning else {}),
        "experiment": provenance["experiment"],
        "dataset": provenance["dataset"],
        "command": provenance["command"],
        **evaluation,
        "coverage": {modality: record["counts"] for modality, record in extractions.items()},
        **({"reduced": reduced} if reduced else {}),
        "data": stats,
        "raw": records["prepare"].get("raw", {}),
        "training": {name: value for name, value in train.items() if name not in _OF_EVERY_STAGE},
        "stages": {
            name: {field: record.get(field) for field in _STAGE_FACTS if field in record or field not in _OPTIONAL}
            for name, record in records.items()
        },
        "config": provenance["config"],
        "keys": provenance["keys"],
        "versions": _all_versions(records),
    }


_OPTIONAL = frozenset({"resumes", "gpu_peak_memory_mb", "device_name", "library_versions"})
_STAGE_FACTS = ("wall_seconds", "peak_memory_mb", "code", "device", "threads", "versions", *sorted(_OPTIONAL))
_OF_EVERY_STAGE = frozenset(
    {"stage", "started", "wall_seconds", "peak_memory_mb", "code", "versions", "machine", "commit", *_OPTIONAL}
)


def library_warning(records: Mapping[str, Mapping[str, Any]], libraries: Mapping[str, Sequence[str]]) -> str | None:
    """Return a warning if features of one experiment come from different versions of a model library.

    A record says the versions that its stage ran with (`versions`), and for outputs taken from the cache those that made
    them (`library_versions`: "transformers 5.23.0" or several, joined by ", " -> number of items).

    Args:
        records: the stages' records by name.
        libraries: the libraries that count, by the name of the record: `extract.MODALITY` and `caption.MODALITY`.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, counted in libraries.items():
        for library, version in sorted(_versions_in(records.get(name, {}))):
            if library in counted:
                found.setdefault(library, {}).setdefault(version, []).append(name)
    mixed = [
        f"{library} " + " and ".join(f"{version} ({', '.join(names)})" for version, names in by_version.items())
        for library, by_version in found.items()
        if len(by_version) > 1
    ]
    return f"features come from different versions of {'; '.join(mixed)}" if mixed else None


def _versions_in(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    found = set((record.get("versions") or {}).items())
    for names in record.get("library_versions") or {}:
        found |= {(library, version) for library, _, version in (name.partition(" ") for name in names.split(", "))}
    return found


def _all_versions(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the version of each library of any stage; that of training where stages differ (`stages` has each)."""
    found = versions(STAGES["publish"].libraries)
    for record in (*records.values(), records["train"]):
        found |= record.get("versions") or {}
    return found


def main() -> None:
    """Run the stage from the command line."""
    with stage("workflow.publish") as call:
        publish(call.spec, call.inputs, call.outputs)


if __name__ == "__main__":
    main()
