"""Snakemake's records against the ledger of files, before a run is planned.

Snakemake judges an output by its record: parameters and inputs. It does not know whether the output is still the file that
the job wrote. Here the record of an output that was changed, cut or found damaged gets other parameters, so that the job
runs again; a record that is lost or unreadable is restored from the ledger; and a file that is itself again, from a backup
for example, is up to date again.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from cm3.common.files import write_json
from cm3.common.ledger import Entry, Ledger
from workflow.snakemake_internals import METADATA, record_path

log = logging.getLogger(__name__)

RECORD_FORMAT = 6
"""Version of Snakemake's records that its comparison of parameters needs."""
CHANGED = "is not the file that the workflow made"
LOST = "the record of this output was damaged"


def check_outputs(ledger: Ledger) -> list[str]:
    """Compare all files of the ledger with their entries, correct Snakemake's records, and return a warning for each fault.

    A declared output that is absent needs no correction: Snakemake makes it again where it is needed.
    """
    warnings = []
    faults: dict[str, str] = {}
    entries: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger.entries():
        if not entry.identity:
            continue
        if not any(Path(path).exists() for path in (entry.path, *entry.outputs)):
            ledger.forget(entry.path)
            continue
        for output in entry.outputs:
            entries[output].append(entry)
        if (Path(entry.path).exists() or _is_needed(entry)) and not ledger.unchanged(entry):
            fault = f"{entry.path} {CHANGED}" + (f" ({entry.damaged})" if entry.damaged else "")
            warnings.append(f"{fault}; it is made again where it is needed")
            for output in entry.outputs:
                faults.setdefault(output, fault)
    readable = set()
    for output, of_job in entries.items():
        if Path(output).exists():
            readable.add(_correct(output, of_job[0], faults.get(output)))
    for path in _unreadable_records(readable):
        write_json(path, _record(None, LOST, {}), checksum=False)
    return sorted(warnings)


def _is_needed(entry: Entry) -> bool:
    """Return whether the absence of a file is a fault: parts are no outputs, and published results belong together."""
    folders = PurePath(entry.path).parts[:-1]
    return entry.path not in entry.outputs or (len(folders) == 2 and folders[0] == "results")


def _correct(output: str, entry: Entry, fault: str | None) -> Path:
    """Correct Snakemake's record of an output where it is needed, and return its path."""
    path = record_path(output)
    record = _read(path)
    identity = fault or entry.identity
    if record is None or record.get("params") != [repr(identity)]:
        write_json(path, _record(record, identity, entry.inputs), checksum=False)
    return path


def _record(old: dict[str, Any] | None, identity: str, inputs: Any) -> dict[str, Any]:
    if old is None:
        checksums = {name: f"sha256:{digest}" for name, digest in inputs.items()}
        old = {"incomplete": False, "record_format_version": RECORD_FORMAT, "input_checksums": checksums}
    return old | {"params": [repr(identity)]}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _unreadable_records(readable: set[Path]) -> Iterator[Path]:
    for path in METADATA.rglob("*"):
        if path not in readable and path.is_file() and not path.name.startswith(".") and _read(path) is None:
            yield path
