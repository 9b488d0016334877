"""Adam by torch's own kernels, with its moments in memory or in a file that the operating system pages in and out."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from cm3.common.arrays import mapped_zeros

OptimizerState = Literal["memory", "disk"]

MAPPED_FROM = 2**16
"""Numbers of a parameter from which its moments are on disk where that is set."""


class Adam:
    """Adam (Kingma and Ba, ICLR 2015) with L2 penalty; the numbers of `torch.optim.Adam`, fused on the CPU and on CUDA.

    The class of torch imports its compiler, which takes 150 MB and a second of each training.

    Attributes:
        lr: step size of the next step.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0, state: OptimizerState = "memory"
    ) -> None:
        """Take the parameters, all on one device.

        Args:
            parameters: those to train.
            lr: step size.
            weight_decay: factor of the parameters that are added to the gradient.
            state: place of the two moments: in memory, or those of large parameters on the CPU in temporary files without a
                name (`cm3.common.arrays.mapped_zeros`).
        """
        self.parameters, self.lr, self.weight_decay = list(parameters), lr, weight_decay
        self._state = state
        self._moments: dict[int, dict[str, Tensor]] = {}  # by position of the parameter

    def zero_grad(self) -> None:
        """Release the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with the parameters that have a gradient."""
        chosen = [(n, p, p.grad) for n, p in enumerate(self.parameters) if p.grad is not None]
        if not chosen:
            return
        held = [self._moments_of(n) for n, _, _ in chosen]
        fused = chosen[0][1].device.type in ("cpu", "cuda")
        adam(
            [p for _, p, _ in chosen],
            [grad for _, _, grad in chosen],
            [moments["exp_avg"] for moments in held],
            [moments["exp_avg_sq"] for moments in held],
            [],
            [moments["step"] for moments in held],
            foreach=False if fused else None,
            fused=fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def _moments_of(self, position: int) -> dict[str, Tensor]:
        if position not in self._moments:
            parameter = self.parameters[position]
            count = torch.tensor(0.0, device=parameter.device if parameter.device.type == "cuda" else "cpu")
            self._moments[position] = {
                "step": count,
                "exp_avg": self._zeros_like(parameter),
                "exp_avg_sq": self._zeros_like(parameter),
            }
        return self._moments[position]

    def _zeros_like(self, parameter: Tensor) -> Tensor:
        plain = parameter.device.type == "cpu" and parameter.dtype == torch.float32
        if self._state == "disk" and plain and parameter.numel() >= MAPPED_FROM:
            return torch.from_numpy(mapped_zeros(parameter.shape))
        return torch.zeros_like(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments and the number of steps, by POSITION.NAME; not copies."""
        return {f"{n}.{name}": value for n, moments in self._moments.items() for name, value in moments.items()}

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Set what `tensors` returned to copies of these values."""
        for key, value in tensors:
            position, name = key.split(".")
            self._moments_of(int(position))[name].copy_(value)
