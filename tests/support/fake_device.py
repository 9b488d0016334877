"""A CUDA device that does not exist: shapes, types and devices of tensors without data, on a machine without a GPU.

torch's FakeTensorMode gives tensors on `cuda`, and refuses operations on tensors of different devices. Autograd's
backward needs a real device; there the device is `meta`, which takes the same branches as a GPU. Random numbers and the
sparse product have no fake kernel and are replaced.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cm3.baselines.networks.bm3
import cm3.baselines.networks.smore
import cm3.model.model
import cm3.model.sampling
from cm3.model.graph import SparseMatrix

# Of an operation: it changes how a tensor is seen, or makes memory, and launches no kernel.
_FREE = [
    "detach",
    "alias",
    "view",
    "_unsafe_view",
    "expand",
    "permute",
    "transpose",
    "t",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "unbind",
    "as_strided",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "diagonal",
    "unfold",
    "_reshape_alias",
]
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "item")


class WaitsError(AssertionError):
    """An operation for which the host waits for the device, or copies from it."""


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel of the device, and refuses those for which the host waits.

    Attributes:
        counts: operations by name.
        largest: entries of the largest tensor that an operation made.
        trace: operations with the shapes of what they made, in order.
    """

    def __init__(self, device: str, capturing: bool = False) -> None:
        """With `capturing`, operations on the host are refused, too, as a CUDA graph cannot hold them."""
        super().__init__()
        self.device, self.counts, self.largest, self.capturing = device, Counter[str](), 0, capturing
        self.trace: list[tuple[str, list[torch.Size]]] = []

    @property
    def total(self) -> int:
        """The number of launches."""
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        found = func(*args, **(kwargs or {}))
        given, made = (list(_tensors(value)) for value in ((args, kwargs), found))
        on_device = [x for x in (*given, *made) if x.device.type == self.device]
        if self.capturing and len(on_device) < len(given) + len(made):
            raise WaitsError(f"{name}: a tensor on the host")
        if not on_device:
            return found
        if name in _WAITS or self._copies(name, given, made):
            raise WaitsError(f"{name}: the host waits for the device")
        if name not in _FREE:
            self.counts[name] += 1
            self.trace.append((name, [x.shape for x in made]))
            self.largest = max([self.largest, *(x.numel() for x in made)])
        return found

    def _copies(self, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        if name not in ("_to_copy", "copy_", "to"):
            return False
        devices = {x.device.type for x in (*given, *made)}
        return len(devices) > 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """Within the body tensors are fake, on `cuda` or `meta`; random numbers and sparse products are empty."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(SparseMatrix, "product", _product)
        for module in (cm3.baselines.networks.bm3, cm3.baselines.networks.smore):
            patch.setattr(module, "seeded_generator", lambda device, seed: torch.Generator())
        for module in (cm3.model.sampling, cm3.model.model):
            patch.setattr(module, "mixing_parameters", lambda alpha, n, device, seed: torch.empty(n, device=device))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**37))
        with FakeTensorMode(allow_non_fake_inputs=False):
            yield


def _product(matrix: SparseMatrix, x: Tensor) -> Tensor:
    assert {part.device for part in (matrix.offsets, matrix.columns, matrix.values)} == {x.device}
    # One launch that reads x and makes the rows.
    return torch.mm(x.new_empty(matrix.shape[0], x.shape[0]), x)


def moved(value: Any, device: str) -> Any:
    """Return an empty copy on the device of a tensor, a list, or a dataclass of them; call it under `fake_device`.

    A module is changed in place: its parameters and buffers are replaced.
    """
    if isinstance(value, nn.Module):
        for part in value.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(moved(parameter, device), parameter.requires_grad))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, moved(buffer, device))
        return value
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value
