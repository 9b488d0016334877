"""GPUs of its own for each job that asks for some: Snakemake counts them, but does not say which is whose."""

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
_DEVICES = Path("/dev")
_SHARED = Path("/tmp")

# What CUDA_VISIBLE_DEVICES holds for none: nothing, the usual way to hide all, and SLURM's word.
_NONE = ("", "-1", "NoDevFiles")


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use: of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in _NONE]
    return list(_listed())


def gpu_here() -> bool:
    """Return whether a job on this machine may find a GPU. Asks no driver, so that planning stays fast."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return bool(visible_gpus())
    devices = any(any(_DEVICES.glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))
    return sys.platform == "darwin" or devices or shutil.which("nvidia-smi") is not None


def _listed() -> dict[str, str]:
    """Return the GPUs that nvidia-smi lists: index -> what is its alone on the whole machine, its UUID."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = answer.stdout.splitlines() if answer.returncode == 0 else []
    pairs = ([part.strip() for part in row.split(",")] for row in rows if row.strip())
    return {pair[0]: pair[-1] for pair in pairs}


@contextlib.contextmanager
def own_gpus(wanted: int | None) -> Iterator[list[str]]:
    """Hold GPUs that no other job of this user on this machine holds, and make them the only ones that CUDA sees.

    Waits until enough are free. The kernel lets go of them when the job ends, however it ends. Must be entered before
    CUDA is initialised; importing torch does not do that. What a scheduler allots by CUDA_VISIBLE_DEVICES is all that is
    chosen from. Where it also hides the others, each job's GPU is called 0, and yet no job waits for another: what is
    held is the device, by its UUID.

    Args:
        wanted: how many; where the machine has fewer, all of them. 0 hides all, so that what takes a GPU where it finds
            one does not use a GPU that another job holds. None (GPUs are not counted) changes nothing.

    Yields:
        the GPUs' ids; none where none is wanted or there.
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
        log.info("of %d GPUs too few are free for this job's %d; waiting", len(ids), wanted)
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
    # Not in TMPDIR: jobs with different values of it share the same GPUs.
    folder = (_SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir())) / f"cm3-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _showing(ids: Iterable[str]) -> Iterator[None]:
    """Let CUDA see these GPUs alone while the body runs."""
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
    """Return `wanted` of the ids in `devices` (id -> device) with their locks; none, and no lock, where fewer are free."""
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
