"""Per-job GPU assignment by file locks; Snakemake only counts GPUs."""

import contextlib
import fcntl
import logging
import os
import re
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
DRIVER_FILE = Path("/proc/driver/nvidia/version")

ALLOTTED = "CM3_ALLOTTED_GPUS"
"""Environment variable of a job that asked for GPUs: their number. Processes that the job starts inherit it."""

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


def nvidia_gpu_here() -> bool:
    """Return whether this process should find an NVIDIA GPU: a device file or nvidia-smi shows one that is not hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and not visible_gpus():
        return False
    return any(DEVICE_FOLDER.glob("nvidia[0-9]*")) or bool(_listed())


def allotted_gpus() -> int:
    """Return the number of GPUs that this process was allotted: by the workflow, or by a scheduler that shows them."""
    given = int(os.environ.get(ALLOTTED, "0"))
    return given or (len(visible_gpus()) if os.environ.get("CUDA_VISIBLE_DEVICES") is not None else 0)


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, from nvidia-smi or the kernel module; None where neither states it."""
    rows = _asked("driver_version")
    if rows:
        return rows[0].strip()
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group() if found else None


def _listed() -> dict[str, str]:
    """Return the GPUs of nvidia-smi: index -> UUID."""
    pairs = ([part.strip() for part in row.split(",")] for row in _asked("index,uuid"))
    return {pair[0]: pair[-1] for pair in pairs}


def _asked(fields: str) -> list[str]:
    """Return the rows of a query of nvidia-smi; none where it is absent or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [row for row in answer.stdout.splitlines() if row.strip()] if answer.returncode == 0 else []


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
    if not wanted:
        yield []
        return
    if not (ids := visible_gpus()):
        with _environment(ALLOTTED, str(wanted)):
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
        with _environment(ALLOTTED, str(len(held))), _showing(held):
            yield list(held)
    finally:
        for lock in held.values():
            lock.close()


def _locks() -> Path:
    # Independent of TMPDIR: jobs with different TMPDIR share the same GPUs.
    folder = (SHARED_FOLDER if SHARED_FOLDER.is_dir() else Path(tempfile.gettempdir())) / f"cm3-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _showing(ids: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """Make only these GPUs visible to CUDA while the body runs."""
    return _environment("CUDA_VISIBLE_DEVICES", ",".join(ids))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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
