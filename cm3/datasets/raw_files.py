"""Provenance of raw files: size, checksum and URL, checked against the configuration."""

import logging
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json, sha256_of
from cm3.common.http import without_secrets
from cm3.common.input_files import unreadable

log = logging.getLogger("cm3.datasets.raw_files")

_FACTS = ("bytes", "sha256", "url")


def record_of(file: Path) -> Path:
    """Return the path of the download stage's record of a file."""
    return file.with_name(f"{file.name}.stage.json")


def read_record(file: Path) -> dict[str, Any]:
    """Return the download stage's record of a file; empty if there is none that can be read."""
    path = record_of(file)
    if not path.exists():
        return {}
    try:
        record = read_json(path)
    except (UserError, OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s), so the origin of %s is unknown", path, error, file)
        return {}
    return record if isinstance(record, dict) else {}


def stamp(file: Path) -> dict[str, int]:
    """Return modification time and inode of a file; a file replaced by another differs in one of them or in its size."""
    status = file.stat()
    return {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def provenance(inputs: dict[str, Path], expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return file, bytes, sha256 and url of each raw file; url is None for files that were not downloaded here.

    Args:
        inputs: raw files by name.
        expected: sha256 and size by name; None or absent if unknown.

    Raises:
        UserError: a file has another size or checksum than expected.
    """
    return {
        name: {"file": str(path), **facts_of(path, expected.get(name) or {})}
        for name, path in inputs.items()
        if not unreadable(path)  # The reader reports the others.
    }


def facts_of(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return bytes, sha256 and url of a file: those of its record if it still is the downloaded file.

    A file whose size, modification time and inode are those of the record is not read.

    Raises:
        UserError: the file has another size or checksum than expected.
    """
    record, size = read_record(path), path.stat().st_size
    if expected.get("size") not in (None, size):
        raise UserError(f"{path}: has {size} bytes and not {expected['size']}; {_REMEDY.format('sizes')}")
    recorded = {name: record.get(name) for name in _FACTS}
    current = recorded["bytes"] == size and record.items() >= stamp(path).items()
    digest = recorded["sha256"] if current and recorded["sha256"] else sha256_of(path)
    if expected.get("sha256") not in (None, digest):
        raise UserError(f"{path}: its sha256 is {digest} and not {expected['sha256']}; {_REMEDY.format('sha256')}")
    if record and digest == recorded["sha256"]:
        return {**recorded, "bytes": size, "url": recorded["url"] and without_secrets(recorded["url"])}
    if record:
        log.warning("%s has changed since it was downloaded, and is used as a file of unknown origin", path)
    else:
        log.info("%s: a file of your own, used unchanged", path)
    return {"bytes": size, "sha256": digest, "url": None}


_REMEDY = (
    "put the published file there, delete it to download it again, or correct `{}` of the dataset in the configuration"
)
