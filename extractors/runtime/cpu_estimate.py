"""Estimated time of a large vision-language model on a CPU, reported before the model is loaded."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from cm3.common.errors import UserError

log = logging.getLogger(__name__)

LARGE = 1_000_000_000
"""Number of parameters from which a model is slow enough on a CPU for an estimate."""

MAX_HOURS = 1.0
_PIXELS_PER_TOKEN = 784  # Qwen2.5-VL: one token per 28 x 28 pixels


def parameters_of(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def tokens_of(pixels: int, prompt: str) -> int:
    """Return the approximate number of tokens of an image and a prompt."""
    return pixels // _PIXELS_PER_TOKEN + len(prompt) // 4


def seconds_per_parameter(precision: str) -> tuple[float, float]:
    """Return this CPU's seconds per parameter and token, for prompt tokens and for generated tokens."""
    import torch

    dtype = getattr(torch, precision)
    side = 1024
    matrix = torch.ones(side, side, dtype=dtype)
    many, one = torch.ones(side, 256, dtype=dtype), torch.ones(side, 1, dtype=dtype)
    return _seconds(lambda: matrix @ many) / (side * side * 256), _seconds(lambda: matrix @ one) / (side * side)


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def hours(parameters: int, items: int, prompt_tokens: int, new_tokens: int, speed: tuple[float, float]) -> float:
    """Return the hours for `items` images one by one, at the two speeds that `seconds_per_parameter` returns."""
    prompt_speed, generation_speed = speed
    return items * parameters * (prompt_tokens * prompt_speed + new_tokens * generation_speed) / 3600


def check_cpu_hours(parameters: int, items: int, estimate: float, allow_slow: bool, instead: str = "") -> None:
    """Log a warning with the estimated hours; raise if they are too many and not allowed.

    Args:
        instead: another option for the error message, ending in a comma and a space.

    Raises:
        UserError: more than MAX_HOURS without allow_slow.
    """
    estimated = (
        f"a model of {parameters / 1e9:.1f} billion parameters on this CPU needs about {estimate:.1f} "
        f"hours for {items} items"
    )
    if estimate > MAX_HOURS and not allow_slow:
        raise UserError(
            f"{estimated}. Run it on a machine with a GPU, {instead}take a smaller model, leave this modality out of the "
            "experiment, or set allow_slow: true"
        )
    log.warning(estimated)
