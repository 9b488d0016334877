"""What the training loop asks of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cm3.distributed import Share
from cm3.sampling import Batch


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


def mean_loss(losses: Sequence[Loss]) -> Loss:
    """Return the mean of losses and of each of their parts."""
    if len(losses) == 1:
        return losses[0]
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).mean() for name in losses[0].parts}
    return Loss(torch.stack([loss.total for loss in losses]).mean(), parts)


class Network(nn.Module):
    """A model of user and item embeddings that the loop can train, checkpoint and score.

    Attributes:
        parts: the names of the loss's parts.
        share: this process's part of each step, where several train; a model that heeds it sets `shares`.
    """

    parts: tuple[str, ...] = ()
    share: Share | None = None
    shares: bool = False

    def begin_epoch(self, seed: int) -> None:
        """Make what stays fixed for an epoch, such as a sampled graph; from `seed` alone, so that runs can go on."""

    def training_embeddings(self, seed: int) -> Any:
        """Return the `Embeddings` of a training step; all its draws come from `seed`, none from a global generator."""
        raise NotImplementedError

    def loss(self, embeddings: Any, batch: Batch) -> Loss:
        """Return the loss of a batch under the embeddings of a training step."""
        raise NotImplementedError

    def step_loss(self, batches: Sequence[Batch], seed: int) -> Loss:
        """Return the mean loss of `batches` over one training forward; a model may embed less than all for it."""
        embeddings = self.training_embeddings(seed)
        return mean_loss([self.loss(embeddings, batch) for batch in batches])

    def embed(self) -> Embeddings:
        """Return the embeddings that are scored and exported, outside autograd."""
        raise NotImplementedError

    def suspects(self) -> tuple[str, ...]:
        """Return settings that can make a loss infinite while every parameter is finite."""
        return ()

    def curves(self) -> dict[str, float]:
        """Return numbers that say what the model has learnt, such as the mean weight of each stream."""
        return {}
