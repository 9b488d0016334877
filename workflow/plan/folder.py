"""Digest of the contents of a folder; only new and changed files are read."""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import atomic, sha256_of

log = logging.getLogger(__name__)

CACHE = Path(".snakemake/folder-digests")
OUTPUTS = ("processed", "results", "logs", ".snakemake")
"""Folders in the working directory that the pipeline writes."""

_TOOLS = (".git", ".venv")  # of the working directory; they change, too, and hold no images
_NO_IMAGES = frozenset(
    {".csv", ".err", ".html", ".json", ".jsonl", ".lock", ".log", ".md", ".out", ".parquet", ".py", ".pyc"}
    | {".sh", ".smk", ".toml", ".tsv", ".txt", ".yaml", ".yml"}
)
_UNREADABLE = "unreadable"


def digest_of_folder(folder: Path) -> str:
    """Return 64 hex digits over the names and contents of all regular files under `folder`.

    A file is read only if its size, modification time or inode is new; a touched file is read again and has the same
    digest. The digests of files are cached in `.snakemake/folder-digests`. Links to nothing, pipes and sockets have no content and
    are left out. A file without read permission counts by its name alone.

    In a folder that holds the working directory, the pipeline's own OUTPUTS and files that are no images by their names
    (logs, tables, code) are left out: they change with every run.

    Raises:
        UserError: the folder does not exist, or is one that the pipeline writes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    outputs = [Path(name).resolve() for name in OUTPUTS]
    real = folder.resolve()
    if inside := next((output for output in outputs if real.is_relative_to(output)), None):
        raise UserError(
            f"{folder}: is in {inside.name}/, which the pipeline writes; put the images into another folder, for example "
            "under raw/ or data/"
        )
    store = CACHE / (hashlib.sha256(os.fsencode(real)).hexdigest()[:16] + ".json")
    known = _read_cache(store)
    now: dict[str, list[Any]] = {}
    around = Path.cwd().resolve().is_relative_to(real)
    left_out = {str(output) for output in [*outputs, *(Path(name).resolve() for name in _TOOLS)]}
    for path, status in _regular_files(folder, left_out):
        if around and Path(path).suffix.lower() in _NO_IMAGES:
            continue
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        before = known.get(path)
        content = before[-1] if before and before[:-1] in (stamp, stamp[:2]) else _content(path)
        if content is not None:
            now[path] = [*stamp, content]
    if now != known:
        _write_cache(store, now)
    digest = hashlib.sha256()
    for name, (*_, content) in now.items():
        digest.update(f"{os.path.relpath(name, folder)}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _regular_files(folder: Path, left_out: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(parent, name)) not in left_out)
        for name in sorted(names):
            path = str(Path(parent, name))
            try:
                status = Path(path).stat()
            except OSError:  # a link to nothing or to itself, or a file that was removed meanwhile
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status


def _content(path: str) -> str | None:
    """Return the sha256 of a file, or a word if it cannot be read; None if it is gone."""
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None
    except PermissionError:
        return _UNREADABLE


def _read_cache(store: Path) -> dict[str, list[Any]]:
    """Return [size, time, inode, digest] by path; files of earlier releases have no inode and no checksum."""
    try:
        found = json.loads(store.read_text("utf-8"))
        checksum, entries = (found["checksum"], found["files"]) if "checksum" in found else (None, found)
        if checksum is not None and checksum != _checksum(entries):
            raise ValueError("its checksum differs")
        return {path: entry for path, entry in entries.items() if entry[-1] != _UNREADABLE}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        log.warning("%s: damaged (%s); all files of the folder are read again", store, error)
        return {}


def _write_cache(store: Path, entries: dict[str, list[Any]]) -> None:
    try:
        with atomic(store) as temporary:
            # Escaped, because names need not be valid UTF-8.
            temporary.write_text(
                json.dumps({"checksum": _checksum(entries), "files": entries}, indent=1) + "\n", "ascii"
            )
    except (OSError, UserError) as error:
        log.warning("%s cannot be written (%s); the folder will be read again", store, error)


def _checksum(entries: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode("ascii")).hexdigest()
