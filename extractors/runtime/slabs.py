"""Slabs: reused host buffers that worker threads fill with prepared inputs while a device computes on earlier ones.

On CUDA the buffers are pinned, so that uploads and downloads run in parallel to the computation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Tensors = Any
"""A tensor, or tensors by name."""


class Slab:
    """One host buffer for the prepared inputs of a batch.

    Args:
        rows: largest number of inputs.
        template: a prepared input, whose shapes and types all others have.
        device: that the inputs are uploaded to.
    """

    def __init__(self, rows: int, template: Tensors, device: "torch.device") -> None:
        import torch

        self._device, self._uploaded = device, Moment(device)
        pinned = device.type == "cuda"
        self._host = _each(template, lambda one: torch.empty((rows, *one.shape), dtype=one.dtype, pin_memory=pinned))

    def wait(self) -> None:
        """Wait until the last upload has read the buffer, before it is filled anew."""
        self._uploaded.wait()

    def write(self, row: int, prepared: Tensors) -> None:
        """Store a prepared input. May be called from several threads for different rows.

        Raises:
            ValueError: its shape is not that of the template.
        """
        for host, one in _pairs(self._host, prepared):
            if host.shape[1:] != one.shape:
                raise ValueError(
                    f"prepared inputs have different shapes: {tuple(host.shape[1:])} and {tuple(one.shape)}"
                )
            host[row].copy_(one)

    def upload(self, rows: Sequence[int]) -> Tensors:
        """Return the inputs at `rows` (ascending) stacked on the device; the copy may still be in progress."""
        import torch

        first, last = rows[0], rows[-1] + 1
        # A copy also on the CPU: the buffer is filled anew while the stack is in use.
        stack = _each(self._host, lambda host: host[first:last].to(self._device, non_blocking=True, copy=True))
        self._uploaded.mark()
        if len(rows) < last - first:
            index = upload(torch.tensor([row - first for row in rows]), self._device)
            stack = _each(stack, lambda one: one[index])
        return stack


def upload(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Return a tensor on a device; on CUDA the copy from the host may still be in progress."""
    return pinned_for(device, tensor).to(device, non_blocking=device.type == "cuda")


def pinned_for(device: "torch.device", tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor of the host in pinned memory if the device is CUDA: its upload then waits for nothing."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


class Download:
    """A tensor on its way from the device to the host."""

    def __init__(self, tensor: "torch.Tensor") -> None:
        import torch

        pinned = tensor.device.type == "cuda"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        self._host.copy_(tensor, non_blocking=pinned)
        self._arrived = Moment(tensor.device)
        self._arrived.mark()

    def wait(self) -> np.ndarray:
        """Return the values once they have arrived."""
        self._arrived.wait()
        found: np.ndarray = self._host.numpy()
        return found


class Moment:
    """A point in the work queue of a device; other devices than CUDA have done all work before a call returns."""

    def __init__(self, device: "torch.device") -> None:
        self._device = device
        self._event: Any = None

    def mark(self) -> None:
        """Set the moment to the end of the work that is queued now."""
        import torch

        if self._device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait until the work queued before the last mark is done."""
        if self._event is not None:
            self._event.synchronize()


def _each(tensors: Tensors, function: Any) -> Tensors:
    if isinstance(tensors, dict):
        return {name: function(one) for name, one in tensors.items()}
    return function(tensors)


def _pairs(first: Tensors, second: Tensors) -> list[tuple[Any, Any]]:
    if isinstance(first, dict):
        return [(first[name], second[name]) for name in first]
    return [(first, second)]
