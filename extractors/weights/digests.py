"""Cached sha256 of files and folders of weights, so that planning a workflow does not read gigabytes each time."""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.files import atomic, sha256_of
from extractors.weights.pickles import pickled_in

MODEL_FILES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".vocab"})
"""Suffixes of the files that a model is loaded from; readmes and exports to other runtimes are not."""

CODE = ".py"
"""Suffix of the code that some models include."""

_SETTLED_SECONDS = 2.0


def cache_folder() -> Path:
    """Return the folder of cached digests: in $CM3_CACHE, else in cm3 in the user's cache folder."""
    base = os.environ.get("CM3_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cm3"
    return Path(base).expanduser() / "digests"


def digest_of(path: Path, code: bool = False) -> str:
    """Return the sha256 of a file, or of a model folder's names and contents. The path itself does not count.

    A file is read once per (path, size, modification time); touching or moving it gives the same digest.

    Args:
        path: a file, or a folder that a model is loaded from.
        code: whether Python files in the folder count.
    """
    if path.is_file():
        return _file_digest(path)
    suffixes = MODEL_FILES | {CODE} if code else MODEL_FILES
    found = {p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()}
    files = sorted(found | set(pickled_in(path)))
    combined = hashlib.sha256()
    for file in files:
        combined.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return combined.hexdigest()


def _file_digest(path: Path) -> str:
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:32]
    entry = cache_folder() / key
    with contextlib.suppress(OSError, ValueError):
        remembered, _, check = entry.read_text(encoding="ascii").partition(" ")
        if check == _check(remembered):
            return remembered
    digest = sha256_of(path)
    # A file written just now may change again within the granularity of the clock: do not cache its digest yet.
    if time.time() - state.st_mtime > _SETTLED_SECONDS:
        with contextlib.suppress(OSError, UserError), atomic(entry) as temporary:
            temporary.write_text(f"{digest} {_check(digest)}", encoding="ascii")
    return digest


def _check(digest: str) -> str:
    """Return the checksum of a cached digest, with which it is stored."""
    return hashlib.sha256(digest.encode()).hexdigest()[:16]
