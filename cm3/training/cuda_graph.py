"""A training step on tensors of fixed shape and address, so that a CUDA graph of it can be captured once and replayed.

A step of a small data set launches some 450 kernels that each take a few microseconds: launching them takes longer than
computing. A CUDA graph launches all of them in one call. It needs the same shapes and addresses in every step, no copy from
or to the host, and no random numbers of its own. So the distinct ids of a batch are padded with ids of count 0, which add
nothing to a loss or gradient, and random numbers are drawn outside. The optimiser stays outside, too: its fused update
launches few kernels, which overlap with the graph, and its learning rate and state need no special form.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cm3.common.errors import UserError
from cm3.model.sampling import Batch, CountedIds

log = logging.getLogger(__name__)

Gradients = Callable[[Sequence[Batch], Sequence[Tensor]], Tensor]
"""Sets the gradients of the parameters, given batches and random draws; returns the values to record."""

_WARM_UP = 3  # runs before a capture, as PyTorch's documentation advises: libraries allocate their workspaces
_MULTIPLE = 64
_MARGIN = 1.06  # the number of distinct ids varies by a few per cent between batches of one size


class StaticStep:
    """Gradients of a step, computed on tensors whose shapes and addresses are the same in every step.

    Equal to the gradients of the batches as they are, up to the order of sums. This class computes them the plain way on any
    device; `GraphedStep` replays a CUDA graph.
    """

    def __init__(self, gradients: Gradients, batches: Sequence[Batch], draws: Sequence[Tensor]) -> None:
        """Take the computation, and the batches and random draws of one step, whose sizes those of all others have."""
        self.gradients = gradients
        self.batches = [_with_room(batch) for batch in batches]
        self.draws = [draw.clone() for draw in draws]

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Return whether batches have the sizes of this step; an epoch's last one, or one with many distinct ids, may not."""
        return len(batches) == len(self.batches) and all(
            len(batch.items) == len(room.items)
            and len(batch.counted_users.ids) <= len(room.counted_users.ids)
            and len(batch.counted_negatives.ids) <= len(room.counted_negatives.ids)
            for batch, room in zip(batches, self.batches, strict=True)
        )

    def run(self, batches: Sequence[Batch], draws: Sequence[Tensor]) -> Tensor:
        """Set the gradients for batches that fit, and return the values to record, valid until the next call."""
        for room, batch in zip(self.batches, batches, strict=True):
            _fill(room, batch)
        for held, draw in zip(self.draws, draws, strict=True):
            held.copy_(draw)
        return self.compute()

    def compute(self) -> Tensor:
        """Compute on the current contents of the tensors."""
        return self.gradients(self.batches, self.draws)


class GraphedStep(StaticStep):
    """A static step as a CUDA graph."""

    def __init__(
        self, gradients: Gradients, parameters: Iterable[Tensor], batches: Sequence[Batch], draws: Sequence[Tensor]
    ) -> None:
        """Capture the graph.

        Raises:
            RuntimeError: an operation that a graph cannot hold, or too little memory.
        """
        super().__init__(gradients, batches, draws)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                super().compute()
        torch.cuda.current_stream().wait_stream(side)
        parameters = list(parameters)
        for parameter in parameters:
            parameter.grad = None  # so that the gradients are made in the graph's memory, and replaced by each replay
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.recorded = super().compute()
        self.held = [(parameter, parameter.grad) for parameter in parameters]

    def compute(self) -> Tensor:
        """Replay the graph on the current contents of the tensors."""
        for parameter, gradient in self.held:
            parameter.grad = gradient  # a step outside the graph has put its own in place
        self.graph.replay()
        return self.recorded


def are_full(batches: Sequence[Batch], number: int, batch_size: int) -> bool:
    """Return whether a step has the sizes of most steps: the last one of an epoch may have fewer or smaller batches."""
    return len(batches) == number and all(len(batch.items) == batch_size for batch in batches)


def graphed_step(
    gradients: Gradients,
    parameters: Iterable[Tensor],
    batches: Sequence[Batch],
    draws: Sequence[Tensor],
    *,
    required: bool,
) -> GraphedStep | None:
    """Return a captured step, or None with a warning where a graph cannot be captured.

    Raises:
        UserError: it cannot, and is required.
    """
    started = time.monotonic()
    try:
        step = GraphedStep(gradients, parameters, batches, draws)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if required:
            raise UserError(
                f"training.cuda_graph = true: the step cannot be captured ({reason}); set it to auto or false"
            ) from error
        log.warning("training.cuda_graph: the step cannot be captured (%s); continuing without a graph", reason)
        return None
    log.info("a step is a CUDA graph, captured in %.1f s", time.monotonic() - started)
    return step


def _with_room(batch: Batch) -> Batch:
    return Batch(
        batch.users.clone(),
        batch.items.clone(),
        batch.negatives.clone(),
        _padded(batch.counted_users),
        _padded(batch.counted_negatives),
    )


def _padded(counted: CountedIds) -> CountedIds:
    """Return a copy with room for somewhat more distinct ids, which occur 0 times."""
    ids, counts = counted.ids, counted.counts
    if counts is None:
        return CountedIds(ids.clone(), None, counted.positions.clone())
    width = -(-int(len(ids) * _MARGIN) // _MULTIPLE) * _MULTIPLE
    width = max(len(ids), min(width, len(counted.positions)))
    # Any valid id does; different ones do not wait for one another where gradients are added up.
    places = torch.arange(width, device=ids.device) % len(ids)
    padding = counts.new_zeros(width - len(ids))
    return CountedIds(ids[places], torch.cat([counts, padding]), counted.positions.clone())


def _fill(room: Batch, batch: Batch) -> None:
    for name in ("users", "items", "negatives"):
        getattr(room, name).copy_(getattr(batch, name))
    _fill_counted(room.counted_users, batch.counted_users)
    _fill_counted(room.counted_negatives, batch.counted_negatives)


def _fill_counted(room: CountedIds, counted: CountedIds) -> None:
    n = len(counted.ids)
    room.ids[:n].copy_(counted.ids)
    room.positions.copy_(counted.positions)
    if room.counts is not None and counted.counts is not None:
        room.counts[:n].copy_(counted.counts)
        room.counts[n:].zero_()
