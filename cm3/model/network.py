"""What the training loop asks of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cm3.common.distributed import Share
from cm3.model.sampling import Batch, Contrast

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_E = TypeVar("_E", bound="DataclassInstance")


@dataclass(frozen=True)
class Embeddings:
    """What a forward gives: users (U, D) and items (I, D), whose dot product is the score. Models may add fields."""

    users: Tensor
    items: Tensor


@dataclass(frozen=True)
class Loss:
    """The scalar loss, and the parts that are worth a curve of their own, by name."""

    total: Tensor
    parts: Mapping[str, Tensor]


def backward(embeddings: _E, losses: Sequence[Callable[[_E], Loss]]) -> Loss:
    """Return the mean of `losses` outside autograd, its gradient added to that of the parameters.

    Where there are several, one loss's graph stands at a time: memory does not grow with their number.

    Args:
        embeddings: a dataclass of tensors and lists of tensors, of which the losses are functions.
    """
    if len(losses) == 1:
        loss = losses[0](embeddings)
        loss.total.backward()
        return _detached(loss)
    joints: list[tuple[Tensor, Tensor]] = []
    leaves = replace(embeddings, **{name: _cut(value, joints) for name, value in vars(embeddings).items()})
    found = []
    for of in losses:
        loss = of(leaves)
        (loss.total / len(losses)).backward()
        found.append(_detached(loss))
    reached = [(joint, leaf.grad) for joint, leaf in joints if leaf.grad is not None]
    torch.autograd.backward([joint for joint, _ in reached], [grad for _, grad in reached])
    parts = {name: torch.stack([loss.parts[name] for loss in found]).mean() for name in found[0].parts}
    return Loss(torch.stack([loss.total for loss in found]).mean(), parts)


def _cut(value: Any, joints: list[tuple[Tensor, Tensor]]) -> Any:
    """Return `value`, a tensor or a list of them, cut off from its graph; each tensor and its leaf go into `joints`."""
    # No closure that calls itself: such a cycle would keep the graphs of several steps until the garbage collector runs.
    if isinstance(value, list):
        return [_cut(x, joints) for x in value]
    if value.grad_fn is None:
        return value
    joints.append((value, value.detach().requires_grad_()))
    return joints[-1][1]


def _detached(loss: Loss) -> Loss:
    return Loss(loss.total.detach(), {name: part.detach() for name, part in loss.parts.items()})


class Network(nn.Module):
    """A model of user and item embeddings that the loop can train, checkpoint and score.

    Attributes:
        parts: the names of the loss's parts.
        share: this process's part of each step, where several train; a model that heeds it sets `shares`.
        contrast: the items that a batch holds beside each pair's own, where no setting says it.
    """

    parts: tuple[str, ...] = ()
    share: Share | None = None
    shares: bool = False
    contrast: Contrast = "negative"

    def begin_epoch(self, seed: int) -> None:
        """Make what stays fixed for an epoch, such as a sampled graph; from `seed` alone, so that runs can go on."""

    def training_embeddings(self, seed: int) -> Any:
        """Return the `Embeddings` of a training step; all its draws come from `seed`, none from a global generator."""
        raise NotImplementedError

    def loss(self, embeddings: Any, batch: Batch) -> Loss:
        """Return the loss of a batch under the embeddings of a training step."""
        raise NotImplementedError

    def backward(self, batches: Sequence[Batch], seed: int) -> Loss:
        """Return the mean loss of `batches` over one training forward, its gradient added to the parameters'.

        A model may embed less than all for it.
        """
        losses = [lambda embeddings, batch=batch: self.loss(embeddings, batch) for batch in batches]
        return backward(self.training_embeddings(seed), losses)

    def embed(self) -> Embeddings:
        """Return the embeddings that are scored and exported, outside autograd."""
        raise NotImplementedError

    def suspects(self) -> tuple[str, ...]:
        """Return settings that can make a loss infinite while every parameter is finite."""
        return ()

    def curves(self) -> dict[str, float]:
        """Return numbers that say what the model has learnt, such as the mean weight of each stream."""
        return {}
