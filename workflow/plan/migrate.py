"""Snakemake's records of files that earlier versions made, rewritten so that the files stay up to date.

Release 0.1.0 identified the code of a job by a digest of its syntax trees. `release_0_1.json` lists the digests of that
release for Python 3.11 to 3.13, by the version that describes the same computation. A record with one of them is
rewritten, so that its file stays up to date; a record with another digest is left alone, so that its file is made again.

Publishing did not read the tables of items and users when the recommendations of a run had ids. Records of publishing get
these two inputs.
"""

import re
from pathlib import Path
from typing import Any

from cm3.common.errors import DamagedFileError
from cm3.common.files import read_json, write_json

DIGESTS = Path(__file__).with_name("release_0_1.json")
MARK = ".versions"
"""A file in the folder of records that says that they have been rewritten; it moves with them."""

_PUBLISHING = ("publish", "publish_item_weights", "publish_lists")
_STATS = "stats.json"
_DONE = {"identity": "versions", "publish": "tables"}

_IDENTITY = re.compile(r"'settings ([0-9a-f]{12}), code (any|[0-9a-f]{16})'")
_SOURCE = re.compile(r'"source":"([^"]+)"')


def migrate_records(folder: Path) -> int:
    """Rewrite the records in `folder`, once, and return how many were rewritten.

    Args:
        folder: Snakemake's metadata, a JSON file for each output.
    """
    mark = folder / MARK
    if mark.exists() and _read(mark) == _DONE:
        return 0
    versions: dict[str, list[str]] = {"any": ["any"]}
    for version, digests in read_json(DIGESTS).items():
        for digest in digests:
            versions.setdefault(digest, []).append(version)
    rewritten = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        record = _read(path)
        if not isinstance(record, dict):
            continue  # left by a killed run; Snakemake ignores it, too
        changes = _with_tables(record)
        params = _migrated(record, versions)
        if params is not None:
            # Without these two, commands and environments that have changed since rerun nothing, whatever the profile.
            record = {name: value for name, value in record.items() if name not in ("code", "software_stack_hash")}
            changes["params"] = params
        if changes:
            write_json(path, record | changes, checksum=False)
            rewritten += 1
    write_json(mark, _DONE)
    return rewritten


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except DamagedFileError:
        return None


def _with_tables(record: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of publishing with the tables of items and users; nothing if they are among them."""
    inputs = set(record.get("input") or ())
    folders = [path.removesuffix(_STATS) for path in inputs if path.endswith(f"/{_STATS}")]
    if record.get("rule") not in _PUBLISHING or len(folders) != 1:
        return {}
    tables = {f"{folders[0]}{name}.parquet" for name in ("items", "users")}
    return {} if tables <= inputs else {"input": sorted(inputs | tables)}


def _migrated(record: dict[str, Any], versions: dict[str, list[str]]) -> list[str] | None:
    """Return the parameters that the job has now, None where its digest is not of the release."""
    for param in record.get("params") or ():
        found = _IDENTITY.fullmatch(str(param))
        if found and found[2] in versions:
            version = _choose(versions[found[2]], str(record.get("shellcmd")))
            # Training had the name of its module as a second parameter.
            return [f"'settings {found[1]}, version {version}'"]
    return None


def _choose(versions: list[str], command: str) -> str:
    # Sources that share a reader share a digest; the command names the source.
    source = _SOURCE.search(command)
    return next((version for version in versions if source and version.endswith(f", {source[1]} 1")), versions[0])
