"""Time and memory of a job, over all its processes and over the pieces of an interrupted and resumed job."""

import contextlib
import ctypes
import json
import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cm3.common.files import atomic

MEASURE_SECONDS = 2.0
SAVE_SECONDS = 10.0


class Usage:
    """Measures a job from entering to leaving it, and continues from what a killed piece of the same job has saved.

    Args:
        note: file for the measurements so far; None saves nothing.
        identity: of the job; a note of another identity counts for nothing.
    """

    def __init__(self, note: Path | None, identity: str) -> None:
        self._note, self._identity = note, identity
        self._began = time.perf_counter()
        self._earlier = _read(note, identity)
        self._peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.forget()
        else:
            self._save()

    def facts(self) -> dict[str, Any]:
        """Return wall_seconds and peak_memory_mb (10^6 bytes), resumes where there were some, and GPU facts where used.

        Memory is that of the process and its children at a time, pages that they share counted once where the system says
        so; that of children is measured every two seconds.
        """
        facts: dict[str, Any] = {
            "wall_seconds": self._seconds(),
            "peak_memory_mb": max(self._earlier.get("peak_memory_mb", 0.0), self._peak_now()),
        }
        if self._earlier:
            facts["resumes"] = self._earlier["resumes"] + 1
        return facts | _gpu_facts()

    def forget(self) -> None:
        """Remove the note of a job that has ended well."""
        if self._note:
            self._note.unlink(missing_ok=True)

    def _seconds(self) -> float:
        return float(self._earlier.get("wall_seconds", 0.0) + time.perf_counter() - self._began)

    def _peak_now(self) -> float:
        self._peak = max(self._peak, memory_of_tree_mb(), peak_memory_mb())
        return self._peak

    def _watch(self) -> None:
        saved = time.perf_counter()
        while not self._ended.wait(MEASURE_SECONDS):
            self._peak_now()
            if time.perf_counter() - saved > SAVE_SECONDS:
                self._save()
                saved = time.perf_counter()

    def _save(self) -> None:
        if self._note is None or not self._note.parent.is_dir():
            return
        note = {
            "identity": self._identity,
            "wall_seconds": self._seconds(),
            "peak_memory_mb": self._peak_now(),
            "resumes": self._earlier["resumes"] + 1 if self._earlier else 0,
        }
        with contextlib.suppress(Exception), atomic(self._note) as temporary:
            temporary.write_text(json.dumps(note))


def _read(note: Path | None, identity: str) -> dict[str, Any]:
    if note is None:
        return {}
    try:
        found = json.loads(note.read_text())
        same = found["identity"] == identity
        return {name: found[name] for name in ("wall_seconds", "peak_memory_mb", "resumes")} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def memory_of_tree_mb() -> float:
    """Return the resident memory of this process and its descendants in MB (10^6 bytes)."""
    own = psutil.Process()
    with contextlib.suppress(psutil.Error):
        children = own.children(recursive=True)
        if children:
            return sum(_memory(process) for process in (own, *children)) / 1e6
    return 0.0  # without children the peak of the process says more


def _memory(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error, OSError):
        # Proportional set size: shared pages are divided among the processes that share them.
        rollup = Path(f"/proc/{process.pid}/smaps_rollup")
        if rollup.exists():
            line = next(line for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
            return float(line.split()[1]) * 1024
        return float(process.memory_info().rss)
    return 0.0


def return_free_memory() -> None:
    """Give the pages of freed blocks that the C library keeps back to the operating system; only glibc does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _gpu_facts() -> dict[str, Any]:
    """Return gpu_peak_memory_mb and device_name of the GPU that this process used through torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    device = torch.cuda.current_device()
    return {
        "gpu_peak_memory_mb": torch.cuda.max_memory_reserved(device) / 1e6,
        "device_name": torch.cuda.get_device_name(device),
    }
