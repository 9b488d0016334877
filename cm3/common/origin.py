"""The machine and the commit that a stage ran with, for its record."""

import functools
import os
import platform
import subprocess
from pathlib import Path

import psutil

SOURCE = Path(__file__).resolve().parents[2]


@functools.cache
def machine() -> str:
    """Return the processor, cores, memory and system, such as "AMD EPYC 7763, 16 cores, 128 GB, Linux"; no host name."""
    memory = psutil.virtual_memory().total / 1e9
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@functools.cache
def commit(source: Path = SOURCE) -> str | None:
    """Return the commit of the source, with "-dirty" if tracked files differ from it; None outside of a checkout."""
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
