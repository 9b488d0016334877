"""The device of the checks, their sizes and their clock."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(ROOT / "benchmarks")]

DEVICE = torch.device(os.environ.get("CM3_CHECK_DEVICE", "cuda"))
TINY = DEVICE.type == "cpu"

Found = tuple[str, str]
"""What a check found, and what that is to be compared with."""


def wait() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Return the mean time of a call."""
    wait()
    clock = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - clock) / times
