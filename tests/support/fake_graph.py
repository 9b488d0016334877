"""A CUDA graph that is recorded and replayed on the CPU: the operations of the body again, on the same tensors."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = ("nonzero", "masked_select", "_unique2")


class FakeGraph(TorchDispatchMode):
    """Records operations in its body, as a capture does, and repeats them.

    What Python computes in the body is fixed at the values of the recording, as in a CUDA graph. Operations whose shapes
    depend on values are refused. Branches of the CPU read values on the host, which must then be the same in each replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        found = func(*args, **(kwargs or {}))
        mutates = func._schema.is_mutable
        is_view = any(value.alias_info is not None for value in func._schema.returns) and not mutates
        if not is_view and not name.startswith(("empty", "new_empty")):
            self.calls.append((func, args, kwargs or {}, None if mutates else found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the operations; their results are written to where those of the recording are."""
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(again), strict=False):
                old.copy_(new)
            if func.overloadpacket.__name__ == "_local_scalar_dense":
                assert again == made, "a value that the host has read differs"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


@contextlib.contextmanager
def fake_cuda_graphs() -> Iterator[None]:
    """Within the body `torch.cuda.CUDAGraph` works on CPU tensors, and streams do nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        patch.setattr(torch.cuda, "graph", lambda graph: graph)
        patch.setattr(torch.cuda, "Stream", lambda: stream)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield
