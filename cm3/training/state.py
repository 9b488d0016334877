"""The state of a training run: what a checkpoint stores and restores."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm3.model.network import Network
from cm3.training.adam import Adam
from cm3.training.checkpoint import Checkpoint


@dataclass
class Best:
    """The epoch with the best validation score."""

    epoch: int = 0
    valid: float | None = None
    test: float | None = None


@dataclass
class State:
    """Position in the loop, and history.

    Attributes:
        epoch, step: the next ones, from 1 and from 0.
        stale: validations since the best.
        losses: (S, 2 + C) the loss, its C components and the norm of the gradient at each step of the epoch.
    """

    losses: Tensor
    epoch: int = 1
    step: int = 0
    stale: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, checkpoint: Checkpoint, model: Network, optimiser: Adam) -> None:
        """Write the state, the parameters and the optimiser's moments to the checkpoint; of several processes the first does."""
        tensors = {f"model.{name}": model.gathered(name, p) for name, p in model.named_parameters()}
        names = [name for name, _ in model.named_parameters()]
        for key, value in optimiser.tensors().items():
            tensors[f"optimiser.{key}"] = model.gathered(names[_position(key)], value) if value.dim() else value
        if model.shard and model.shard.rank:
            return
        counts = {"epoch": self.epoch, "step": self.step, "stale": self.stale, "best": asdict(self.best)}
        checkpoint.save({**tensors, "parts": self.losses}, {**counts, "history": self.history})

    @staticmethod
    def load(checkpoint: Checkpoint, model: Network, optimiser: Adam, losses: Tensor) -> "State | None":
        """Return the checkpoint's state and restore parameters and moments; None where there is no checkpoint."""
        stored = checkpoint.load()
        if stored is None:
            return None
        tensors, counts = stored
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(model.own_part(name, tensors[f"model.{name}"]))
        optimiser.load(_moments(tensors, model))
        counts["best"] = Best(**counts["best"])
        losses[:, : tensors["parts"].shape[1]] = tensors["parts"]  # earlier versions stored no norms
        return State(losses, **counts)


def _moments(tensors: Mapping[str, Tensor], model: Network) -> Iterator[tuple[str, Tensor]]:
    names = [name for name, _ in model.named_parameters()]
    for key in tensors:
        if key.startswith("optimiser."):
            place, value = key.removeprefix("optimiser."), tensors[key]
            yield place, model.own_part(names[_position(place)], value) if value.dim() else value


def _position(key: str) -> int:
    """Return the position of a parameter in a key of `Adam.tensors`."""
    return int(key.partition(".")[0])
