"""One GPU for each job that asks for one: Snakemake counts GPUs, but does not say which is whose."""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger("stage")

_POLL_SECONDS = 0.5


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use: of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []


@contextlib.contextmanager
def own_gpu(wanted: int) -> Iterator[str | None]:
    """Hold a GPU that no other job of this user on this machine holds, and make it the only one that CUDA sees.

    Waits until one is free. The kernel lets go of it when the job ends, however it ends. Must be entered before CUDA
    is initialised; importing torch does not do that.

    Args:
        wanted: 0 holds none.

    Yields:
        the GPU's id, or None where none is wanted or there.
    """
    ids = visible_gpus() if wanted else []
    if not ids:
        yield None
        return
    folder = Path(tempfile.gettempdir()) / f"cm3-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held = _first_free(folder, ids)
    if held is None:
        log.info("all %d GPUs are held by other jobs; waiting for one", len(ids))
    while held is None:
        time.sleep(_POLL_SECONDS)
        held = _first_free(folder, ids)
    name, lock = held
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = name
    try:
        yield name
    finally:
        lock.close()
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _first_free(folder: Path, ids: list[str]) -> tuple[str, IO[str]] | None:
    for name in ids:
        lock = (folder / f"{name.replace('/', '_')}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return name, lock
    return None
