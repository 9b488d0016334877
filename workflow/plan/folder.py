"""Digest of the contents of a folder; only new and changed files are read."""

import hashlib
import os
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.files import read_json, sha256_of, write_json

CACHE = Path(".snakemake/folder-digests")


def digest_of_folder(folder: Path) -> str:
    """Return 64 hex digits over the names and contents of all files under `folder`.

    A file is read only if its size or modification time is new; a touched file is read again and has the same digest.
    The digests of files are cached in `.snakemake/folder-digests`.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    store = CACHE / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".json")
    known = read_json(store) if store.exists() else {}
    now = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            before = known.get(str(path))
            now[str(path)] = before if before and before[:2] == stamp else [*stamp, sha256_of(path)]
    if now != known:
        write_json(store, now)
    digest = hashlib.sha256()
    for name, (_, _, content) in now.items():
        digest.update(f"{os.path.relpath(name, folder)}\0{content}\n".encode())
    return digest.hexdigest()
