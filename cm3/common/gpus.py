"""Per-job GPU assignment by file locks; Snakemake only counts GPUs."""

import contextlib
import logging
import math
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

from cm3.common.files import lock

log = logging.getLogger("stage")

_POLL_SECONDS = 0.5
DEVICE_FOLDER = Path("/dev")
SHARED_FOLDER = Path("/tmp")
DRIVER_FILE = Path("/proc/driver/nvidia/version")

ALLOTTED = "CM3_ALLOTTED_GPUS"
"""Environment variable of a job that asked for GPUs: their number. Processes that the job starts inherit it."""

SHARES = 20
"""Parts of a GPU that jobs can share."""

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
def own_gpus(wanted: float | None) -> Iterator[list[str]]:
    """Lock GPUs that no other job of this user on this machine holds, and make only them visible to CUDA.

    Waits until enough are free. The kernel releases the locks when the job ends, in whatever way. Must be entered before
    CUDA is initialised; importing torch does not initialise it. Only GPUs that a scheduler allots by CUDA_VISIBLE_DEVICES
    are used. Locks are by UUID: where a scheduler hides the other GPUs, each job's GPU has the id 0, and jobs do not wait
    for one another.

    Args:
        wanted: number of GPUs; where the machine has fewer, all of them. Below 1: a share of one GPU, which jobs whose
            shares sum up to 1 hold together; a share limits neither the memory nor the arithmetic of a job. 0 hides all
            GPUs, so that a library does not use one that another job holds. None changes nothing, for runs in which GPUs
            are not counted.

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
        with _environment(ALLOTTED, str(math.ceil(wanted))):
            yield []
        return
    folder, uuids = _locks(), _listed()
    devices = {name: uuids.get(name, name).replace("/", "_") for name in ids}
    with contextlib.ExitStack() as locks:
        held = _choose(folder, devices, wanted, locks)
        if not held:
            log.info("of %d GPUs too few are free for this job, which needs %g; waiting", len(ids), wanted)
        while not held:
            time.sleep(_POLL_SECONDS)
            held = _choose(folder, devices, wanted, locks)
        with _environment(ALLOTTED, str(len(held))), _showing(held):
            yield held


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


def _choose(folder: Path, devices: dict[str, str], wanted: float, locks: contextlib.ExitStack) -> list[str]:
    """Return the ids of free GPUs and leave their locks in `locks`; empty, with no lock, where too few are free.

    A GPU has one lock for each of its `SHARES`. A share is taken of the GPU with the least left, so that others stay whole.

    Args:
        folder: of the lock files.
        devices: file names of the GPUs by id.
        wanted: number of GPUs, or a share of one.
        locks: closes the lock files when the job ends.
    """
    needed = SHARES if wanted >= 1 else max(1, int(wanted * SHARES + 1e-9))
    count = min(int(wanted) or 1, len(devices))
    with (folder / "choosing.lock").open("a") as choosing:
        lock(choosing)
        free = {name: _free_shares(folder, device) for name, device in devices.items()}
        fitting = sorted((name for name in free if len(free[name]) >= needed), key=lambda name: len(free[name]))
        chosen = fitting[:count] if len(fitting) >= count else []
        for name, files in free.items():
            for number, file in enumerate(files):
                if name in chosen and number < needed:
                    locks.enter_context(file)
                else:
                    file.close()
    return chosen


def _free_shares(folder: Path, device: str) -> list[IO[str]]:
    """Lock all shares of a GPU that no other job holds, and return the lock files."""
    held = []
    for number in range(SHARES):
        file: IO[str] = (folder / f"{device}.{number:02d}.lock").open("a")
        if lock(file, wait=False):
            held.append(file)
        else:
            file.close()
    return held
