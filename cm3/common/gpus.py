"""Per-job GPU assignment by file locks; Snakemake only counts GPUs."""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger("stage")

_POLL_SECONDS = 0.5
DEVICE_FOLDER = Path("/dev")
SHARED_FOLDER = Path("/tmp")

# Values of CUDA_VISIBLE_DEVICES without a GPU: empty, the usual -1, and SLURM's name.
_NONE = ("", "-1", "NoDevFiles")


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all of nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in _NONE]
    return list(_listed())


def gpu_here() -> bool:
    """Return whether a job on this machine may find a GPU. Does not query the driver, so that planning stays fast."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return bool(visible_gpus())
    devices = any(any(DEVICE_FOLDER.glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))
    return sys.platform == "darwin" or devices or shutil.which("nvidia-smi") is not None


def _listed() -> dict[str, str]:
    """Return the GPUs of nvidia-smi: index -> UUID."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = answer.stdout.splitlines() if answer.returncode == 0 else []
    pairs = ([part.strip() for part in row.split(",")] for row in rows if row.strip())
    return {pair[0]: pair[-1] for pair in pairs}


@contextlib.contextmanager
def own_gpus(wanted: int | None) -> Iterator[list[str]]:
    """Lock GPUs that no other job of this user on this machine holds, and make only them visible to CUDA.

    Waits until enough are free. The kernel releases the locks when the job ends, in whatever way. Must be entered before
    CUDA is initialised; importing torch does not initialise it. Only GPUs that a scheduler allots by CUDA_VISIBLE_DEVICES
    are used. Locks are by UUID: where a scheduler hides the other GPUs, each job's GPU has the id 0, and jobs do not wait
    for one another.

    Args:
        wanted: number of GPUs; where the machine has fewer, all of them. 0 hides all GPUs, so that a library does not use
            one that another job holds. None changes nothing, for runs in which GPUs are not counted.

    Yields:
        ids of the GPUs; empty where none is wanted or none exists.
    """
    if wanted == 0 and gpu_here():
        with _showing([]):
            yield []
        return
    if not wanted or not (ids := visible_gpus()):
        yield []
        return
    folder = _locks()
    uuids = _listed()
    devices = {name: uuids.get(name, name) for name in ids}
    held = _free(folder, devices, min(wanted, len(ids)))
    if not held:
        log.info("of %d GPUs too few are free for this job, which needs %d; waiting", len(ids), wanted)
    while not held:
        time.sleep(_POLL_SECONDS)
        held = _free(folder, devices, min(wanted, len(ids)))
    try:
        with _showing(held):
            yield list(held)
    finally:
        for lock in held.values():
            lock.close()


def _locks() -> Path:
    # Independent of TMPDIR: jobs with different TMPDIR share the same GPUs.
    folder = (SHARED_FOLDER if SHARED_FOLDER.is_dir() else Path(tempfile.gettempdir())) / f"cm3-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _showing(ids: Iterable[str]) -> Iterator[None]:
    """Make only these GPUs visible to CUDA while the body runs."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _free(folder: Path, devices: dict[str, str], wanted: int) -> dict[str, IO[str]]:
    """Lock `wanted` of `devices` (id -> device) and return ids and locks; empty, with no lock, where fewer are free."""
    held: dict[str, IO[str]] = {}
    for name, device in devices.items():
        lock: IO[str] = (folder / f"{device.replace('/', '_')}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        held[name] = lock
        if len(held) == wanted:
            return held
    for lock in held.values():
        lock.close()
    return {}
