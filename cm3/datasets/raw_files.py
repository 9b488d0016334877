"""Provenance of raw files: size, checksum and URL, checked against the configuration."""

import logging
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json, sha256_of
from cm3.common.input_files import unreadable

log = logging.getLogger("cm3.datasets.raw_files")


def record_of(file: Path) -> Path:
    """Return the path of the download stage's record of a file."""
    return file.with_name(f"{file.name}.stage.json")


def provenance(inputs: dict[str, Path], expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return file, bytes, sha256 and url of each raw file; files that were not downloaded here are checked.

    Args:
        inputs: raw files by name.
        expected: sha256 and size by name; None or absent if unknown.

    Raises:
        UserError: a file that was not downloaded here has another size or checksum than expected.
    """
    facts = {}
    for name, path in inputs.items():
        if unreadable(path):
            continue  # The reader reports it.
        record = read_json(record_of(path)) if record_of(path).exists() else {}
        size = path.stat().st_size
        if record.get("bytes") != size:
            record = _by_hand(path, size, expected.get(name) or {})
        facts[name] = {"file": str(path), **{key: record.get(key) for key in ("bytes", "sha256", "url")}}
    return facts


def _by_hand(path: Path, size: int, expected: dict[str, Any]) -> dict[str, Any]:
    log.info("%s was not downloaded by this pipeline and is used unchanged", path)
    if expected.get("size") not in (None, size):
        raise UserError(f"{path}: has {size} bytes and not {expected['size']}; put the published file there")
    digest = sha256_of(path)
    if expected.get("sha256") not in (None, digest):
        raise UserError(f"{path}: its sha256 is {digest} and not {expected['sha256']}; put the published file there")
    return {"bytes": size, "sha256": digest, "url": None}
