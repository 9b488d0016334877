"""The device that tensors are on, and the number of CPU threads. Imports torch on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm3.common.errors import UserError

if TYPE_CHECKING:
    import torch


def select_device(name: str, key: str = "training.device") -> torch.device:
    """Return the device of a setting; auto selects CUDA, then MPS, then the CPU.

    Args:
        name: auto, cuda, mps or cpu.
        key: path of the setting in the configuration, for the error message.

    Raises:
        UserError: the machine has no such device; the message names the key and the devices that it has.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind, present in available.items() if present]
    if name == "auto":
        return torch.device(usable[0])
    if name not in usable:
        raise UserError(f"{key} = {name!r}: not available on this machine; use auto, {' or '.join(usable)}")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch; None keeps its default, one per core."""
    import torch

    if threads:
        torch.set_num_threads(threads)
