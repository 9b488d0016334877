"""The interface between a model and the training loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import get_total_norm

from cm3.common.distributed import ProcessShard
from cm3.common.usage import return_free_memory
from cm3.model.sampling import Batch, NegativeSampling

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_E = TypeVar("_E", bound="DataclassInstance")


@dataclass(frozen=True)
class Embeddings:
    """Output of a forward pass: users (U, D) and items (I, D), whose dot product is the score. Models may add fields."""

    users: Tensor
    items: Tensor


@dataclass(frozen=True)
class Loss:
    """The scalar loss, and its components by name, which are logged as curves."""

    total: Tensor
    components: Mapping[str, Tensor]


LARGE_MODEL = 2**28
"""Bytes of parameters from which a step on the CPU gives freed memory back to the system, at the price of page faults.

Several processes of a machine share its memory: it is divided by their number."""


def backward(embeddings: _E, losses: Sequence[Callable[[_E], Loss]], large: bool = False) -> Loss:
    """Return the mean of `losses` outside autograd, its gradient added to that of the parameters.

    Of several losses one graph exists at a time: memory does not grow with their number. The embeddings and their gradients
    are then released as soon as the backward pass of what made them has read them, if the caller has no reference to them.

    Args:
        embeddings: a dataclass of tensors and lists of tensors, the argument of each loss.
        losses: of the embeddings.
        large: `Network.is_large`.
    """
    if len(losses) == 1:
        loss = losses[0](embeddings)
        loss.total.backward()
        return _detached(loss)
    cuts: list[tuple[Tensor, Tensor]] = []
    leaves = replace(embeddings, **{name: _cut(value, cuts) for name, value in vars(embeddings).items()})
    del embeddings
    found = []
    for compute in losses:
        loss = compute(leaves)
        (loss.total / len(losses)).backward()
        found.append(_detached(loss))
        del loss
    reached = [(output, leaf.grad) for output, leaf in cuts if leaf.grad is not None]
    rest: Tensor = _Cut.apply([grad for _, grad in reached], *(output for output, _ in reached))
    del leaves, cuts, reached
    if large:
        return_free_memory()  # of the losses; what follows takes most of a step's memory
    rest.backward()
    components = {name: torch.stack([x.components[name] for x in found]).mean() for name in found[0].components}
    return Loss(torch.stack([loss.total for loss in found]).mean(), components)


class _Cut(torch.autograd.Function):
    """A number without meaning, whose backward pass gives its inputs the gradients in a list, which is emptied."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(ctx.grads)
        ctx.grads.clear()
        return None, *grads


def _cut(value: Any, cuts: list[tuple[Tensor, Tensor]]) -> Any:
    """Return `value`, a tensor or a list of tensors, detached; each tensor and its new leaf are added to `cuts`."""
    # No closure that calls itself: such a cycle would keep the graphs of several steps until the garbage collector runs.
    if isinstance(value, list):
        return [_cut(x, cuts) for x in value]
    if value.grad_fn is None:
        return value
    cuts.append((value, value.detach().requires_grad_()))
    return cuts[-1][1]


def _detached(loss: Loss) -> Loss:
    return Loss(loss.total.detach(), {name: value.detach() for name, value in loss.components.items()})


class Network(nn.Module):
    """A model of user and item embeddings that the loop can train, checkpoint and score.

    Attributes:
        components: names of the loss's components.
        shard: this process's part of each step, where several train one model.
        supports_ddp: whether the model uses `shard`.
        split_parameters: names of parameters of which each of several processes holds its part of dimension 1.
        supports_cuda_graph: whether it has `backward_drawn`, and that neither waits for a device nor depends on the epoch.
        negative_sampling: how the negatives of a batch are sampled, where no setting decides it.
    """

    components: tuple[str, ...] = ()
    shard: ProcessShard | None = None
    supports_ddp: bool = False
    split_parameters: tuple[str, ...] = ()
    supports_cuda_graph: bool = False
    negative_sampling: NegativeSampling = "negative"

    def split(self, shard: ProcessShard) -> None:
        """Keep this process's part of the `split_parameters`, and take part in the steps of several processes."""
        self.shard, self._sizes = shard, {}
        for name in self.split_parameters:
            whole = self.get_parameter(name).detach()
            self._sizes[name] = whole.shape[1]
            setattr(self, name, nn.Parameter(whole[:, shard.pairs(whole.shape[1])].clone()))

    def is_split(self, name: str) -> bool:
        """Return whether this process holds a part only of the parameter `name`."""
        return self.shard is not None and name in self.split_parameters

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """Return the whole of a tensor of the shape of the parameter `name`, as `ProcessShard.gather` does."""
        return self.shard.gather(part, self._sizes[name]) if self.shard and self.is_split(name) else part

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of a tensor of the shape of the parameter `name`."""
        return whole[:, self.shard.pairs(whole.shape[1])] if self.shard and self.is_split(name) else whole

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of all numbers of tensors, parameters or gradients, by the names of the parameters."""
        if self.shard is None:
            return get_total_norm(tensors.values())
        whole = get_total_norm([x for name, x in tensors.items() if not self.is_split(name)])
        own = [x for name, x in tensors.items() if self.is_split(name) and x.numel()]
        # A process may hold no stream; its 0 must be on the device of the others' parts.
        parts = get_total_norm(own).to(whole.device) if own else whole.new_zeros(())
        return (whole.square() + self.shard.sum(parts.square())).sqrt()

    def is_large(self) -> bool:
        """Return whether the parameters have many bytes, on the CPU: see `LARGE_MODEL`."""
        least = LARGE_MODEL // (self.shard.size if self.shard else 1)
        return sum(p.nbytes for p in self.parameters() if p.device.type == "cpu") >= least

    def begin_epoch(self, seed: int) -> None:
        """Prepare state that is fixed for an epoch, such as a sampled graph; from `seed` alone, so that runs can resume."""

    def training_embeddings(self, seed: int) -> Any:
        """Return the `Embeddings` of a training step; all random numbers come from `seed`, none from a global generator."""
        raise NotImplementedError

    def random_draws(self, seed: int) -> tuple[Tensor, ...]:
        """Return the random numbers of a training step, which processes that train one model must have in common."""
        return ()

    def loss(self, embeddings: Any, batch: Batch) -> Loss:
        """Return the loss of a batch given the embeddings of a training step."""
        raise NotImplementedError

    def backward(self, batches: Sequence[Batch], seed: int) -> Loss:
        """Return the mean loss of `batches` over one training forward, its gradient added to the parameters'.

        A model may embed only the users and items that the batches need.
        """
        losses = [lambda embeddings, batch=batch: self.loss(embeddings, batch) for batch in batches]
        return backward(self.training_embeddings(seed), losses)

    def backward_drawn(self, batches: Sequence[Batch], draws: Sequence[Tensor]) -> Loss:
        """Return `backward`, given the `random_draws` of a step."""
        raise NotImplementedError

    def embed(self) -> Embeddings:
        """Return the embeddings that are scored and exported, outside autograd."""
        raise NotImplementedError

    def suspects(self) -> tuple[str, ...]:
        """Return the settings that can make a loss infinite while every parameter is finite."""
        return ()

    def curves(self, embedded: Any = None) -> dict[str, float]:
        """Return further numbers to log each epoch, such as the mean weight of each stream.

        Args:
            embedded: what `embed` returns for the current parameters, where it was computed.
        """
        return {}
