"""Where a training run stands: what a checkpoint holds, and how a run goes on from it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm3.model.network import Network
from cm3.training.checkpoint import Checkpoint


@dataclass
class Best:
    """The epoch that scored best in validation."""

    epoch: int = 0
    valid: float | None = None
    test: float | None = None


@dataclass
class State:
    """The loop's place, what it has seen, and the best epoch's parameters and embeddings.

    Attributes:
        epoch, step: the next to do, from 1 and from 0.
        stale: validations since the best.
        parts: (S, P) loss and its parts of the epoch's steps.
        best_tensors: `best.NAME` of each parameter, `best_users`, `best_items`.
    """

    parts: Tensor
    epoch: int = 1
    step: int = 0
    stale: int = 0
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_tensors: dict[str, Tensor] = field(default_factory=dict)

    def save(self, checkpoint: Checkpoint, model: Network, optimiser: torch.optim.Optimizer) -> None:
        """Write all of it, the parameters and the optimiser's moments to the checkpoint."""
        tensors = {f"model.{name}": p for name, p in model.named_parameters()}
        for index, values in optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{index}.{name}": value for name, value in values.items()})
        counts = {"epoch": self.epoch, "step": self.step, "stale": self.stale, "best": asdict(self.best)}
        checkpoint.save({**tensors, **self.best_tensors, "parts": self.parts}, {**counts, "history": self.history})

    @staticmethod
    def load(checkpoint: Checkpoint, model: Network, optimiser: torch.optim.Optimizer, parts: Tensor) -> "State | None":
        """Return what the checkpoint holds, with parameters and moments put back; None where there is none."""
        stored = checkpoint.load()
        if stored is None:
            return None
        tensors, counts = stored
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        whole = optimiser.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = value
        optimiser.load_state_dict(whole)
        best_tensors = {name: value.to(parts.device) for name, value in tensors.items() if name.startswith("best")}
        counts["best"] = Best(**counts["best"])
        return State(parts.copy_(tensors["parts"]), **counts, best_tensors=best_tensors)
