"""Where tensors live and how many threads work on them."""

import torch

from cm3.common.errors import UserError


def select_device(name: str) -> torch.device:
    """Return the device called `name`; auto takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the machine has no such device.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present.get(name):
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(f"device {name!r} is not available here (usable: auto, {usable}); change training.device")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """Let torch use `threads` CPU threads; None leaves its choice, one per core."""
    if threads:
        torch.set_num_threads(threads)
