"""Training by several processes, as torchrun starts them: each takes a share of every batch."""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from cm3.common.errors import UserError


@dataclass(frozen=True)
class Share:
    """This process's part of a step: number `rank` of `size`.

    All processes hold the same parameters and draw the same batches, negatives and mixing parameters. Each computes the
    forward, its share of the pairs of users and items and of the pairs within the batch, and the gradient of those; the
    sum of the gradients is that of one process with the whole batch.
    """

    rank: int
    size: int

    def pairs(self, n: int) -> slice:
        """Return this process's part of `n` pairs."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def owns(self, block: int) -> bool:
        """Whether a block of rows is this process's; in turns, as blocks of a triangle differ in size."""
        return block % self.size == self.rank

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all processes; its gradient stays each process's own."""
        return _Sum.apply(value)

    def merge(self, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest peak, and the sum of all totals that stand relative to their own process's peak."""
        highest = peak.clone()
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        total = total * (peak - highest).exp()
        distributed.all_reduce(total)
        return highest, total

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all processes."""
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Share | None]:
    """Join the other processes that torchrun has started, and yield this one's share; None for a single process.

    On CUDA each process takes the GPU of its local rank, and NCCL connects them; gloo does on the CPU.

    Raises:
        UserError: fewer GPUs than processes.
    """
    if not started_by_torchrun():
        yield None
        return
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(
                f"training.processes: {here} processes have {gpus} GPU{'s' * (gpus > 1)}, and each needs its own; lower it, "
                f"or let the job have more: --resources gpu={here}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Share(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` in several processes of this machine, as torchrun does, and wait for them.

    Raises:
        SystemExit: a process failed, or the wait was ended by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        raise SystemExit(next((code for code in codes if code > 0), 1)) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
