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

from cm3.common.errors import UserError
from cm3.common.torchrun import started_by_torchrun


@dataclass(frozen=True)
class ProcessShard:
    """This process's part of a training step: process `rank` of `size`.

    All processes hold the same parameters and sample the same batches, negatives and mixing parameters. Each propagates some of
    the streams, and computes the loss and its gradient for a part of the user-item pairs and of the pairs within the batch.
    The sum of the gradients equals the gradient of a single process with the whole batch.
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

    def add_up(self, table: Tensor) -> None:
        """Replace a contiguous table by the sum of those of all processes, outside autograd."""
        distributed.all_reduce(table)

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

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

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


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[ProcessShard | None]:
    """Connect the processes that torchrun started, and yield this one's shard; None for a single process.

    On CUDA each process uses the GPU of its local rank and NCCL; on the CPU they use gloo. After an error of the body,
    disconnecting may take `TEARDOWN_SECONDS`, as it can wait for processes that wait for this one; a process that is
    still there `EXIT_SECONDS` later is ended by the kernel. The launcher then ends the others.

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
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
