"""Training of one model by several processes that torchrun starts: each computes a part of every batch."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from cm3.common.arrays import blocks, mapped_zeros
from cm3.common.errors import UserError
from cm3.common.torchrun import started_by_torchrun


@dataclass(frozen=True)
class ProcessShard:
    """This process's part of a training step: process `rank` of `size`.

    All processes sample the same batches, negatives and mixing parameters. Each holds and propagates some of the streams of
    the users, and computes the loss and its gradient for a part of the user-item pairs and of the pairs within the batch.
    All hold the other parameters; the sum of their gradients equals the gradient of a single process with the whole batch.
    """

    rank: int
    size: int

    def pairs(self, n: int) -> slice:
        """Return this process's part of `n` pairs."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def owns(self, block: int) -> bool:
        """Whether a block of rows is this process's; round-robin, as blocks of a triangle differ in size."""
        return block % self.size == self.rank

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all processes; the gradient of each process is that of its own summand."""
        found: Tensor = _Sum.apply(value)
        return found

    def join(self, part: Tensor, columns: slice, width: int) -> Tensor:
        """Return (n, `width`) of this process's `columns` (n, c) and those of the others; gradients of all are added up."""
        found: Tensor = _Join.apply(part, columns, width)
        return found

    def gather(self, part: Tensor, size: int) -> Tensor:
        """Return in the first process, on the CPU, the table of which each process holds its `pairs(size)` of dimension 1.

        The others get their own part. The table is float32 and in a temporary file, which the system pages in and out: the
        first process may have no memory for it. Outside autograd.
        """
        part = part.detach()
        if self.rank:
            for rows in blocks(len(part)):
                distributed.send(part[rows].cpu().contiguous(), 0)
            return part
        whole = torch.from_numpy(mapped_zeros((len(part), size, *part.shape[2:])))
        whole[:, self.pairs(size)] = part.cpu()
        for rank in range(1, self.size):
            theirs = ProcessShard(rank, self.size).pairs(size)
            for rows in blocks(len(part)):
                place = whole[rows, theirs]
                received = torch.empty(place.shape)
                distributed.recv(received, rank)
                place.copy_(received)
        return whole

    def merge(self, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest peak, and the sum of all totals relative to it; each is given relative to its own peak."""
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

    def agree(self, values: Sequence[int]) -> list[int]:
        """Return the first process's numbers. On the hosts alone: no GPU waits."""
        held = torch.tensor(values)
        distributed.broadcast(held, 0)
        return held.tolist()

    def mean(self, value: float, count: int) -> float:
        """Return the mean over all processes of a mean over `count` values, and of none where that is 0."""
        sums = torch.tensor([value * count if count else 0.0, count], dtype=torch.float64)
        distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def union(self, names: Iterable[str]) -> list[str]:
        """Return the names of all processes, each once."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, list(names))
        return list(dict.fromkeys(name for names in found for name in names))

    def check_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """Check that all processes have the same values.

        Args:
            tensors: this process's; copied to the host.
            what: what they are, for the message.

        Raises:
            UserError: in every process, if they differ; the message names the devices.
        """
        tensors = list(tensors)
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        device = tensors[0].device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, (digest.hexdigest()[:12], name))
        if len({value for value, _ in found}) > 1:
            each = ", ".join(f"process {rank} on {device} has {value}" for rank, (value, device) in enumerate(found))
            raise UserError(
                f"training.processes: the processes drew different {what} from the same seed ({each}); random numbers "
                "differ between GPU models and library versions: use equal GPUs, or set training.processes to 1"
            )


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


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, columns: slice, width: int) -> Tensor:
        ctx.columns = columns
        table = part.new_zeros(len(part), width)
        table[:, columns] = part
        distributed.all_reduce(table)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A copy: autograd may hand the same gradient to others.
        total = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[:, ctx.columns], None, None


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[ProcessShard | None]:
    """Connect the processes that torchrun started, and yield this one's shard; None for a single process.

    On CUDA each process uses the GPU of its local rank. NCCL exchanges tensors on GPUs, and gloo those on the CPU. After an
    error of the body, disconnecting may take `TEARDOWN_SECONDS`, as it can wait for processes that wait for this one; a
    process that is still there `EXIT_SECONDS` later is ended by the kernel. The launcher then ends the others.

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
                f"or give the job more GPUs: --resources gpu={here}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield ProcessShard(distributed.get_rank(), distributed.get_world_size())
    except BaseException:
        _disconnect_within(TEARDOWN_SECONDS)
        raise
    distributed.destroy_process_group()


TEARDOWN_SECONDS = 10.0
EXIT_SECONDS = 30


def _disconnect_within(seconds: float) -> None:
    thread = threading.Thread(target=_destroy_quietly, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() and threading.current_thread() is threading.main_thread():
        # Threads of the communication library can block the end of the process, too.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)


def _destroy_quietly() -> None:
    # A group whose peers are gone may raise anything; the error of the body is the one to report.
    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` in several processes on this machine, as torchrun does, and wait for them.

    Raises:
        SystemExit: a process failed, or a signal ended the wait.
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
