"""How long a large vision-language model would take on a processor, told before it starts."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from cm3.common.errors import UserError

log = logging.getLogger(__name__)

LARGE = 1_000_000_000
"""Parameters from which a model is slow enough on a processor for an estimate."""

BEARABLE_HOURS = 1.0
_PIXELS_PER_TOKEN = 784  # Qwen2.5-VL: a token stands for 28 x 28 pixels


def parameters_of(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files, read from their headers alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def tokens_of(pixels: int, prompt: str) -> int:
    """Return about how many tokens an image and a prompt make."""
    return pixels // _PIXELS_PER_TOKEN + len(prompt) // 4


def seconds_per_parameter(precision: str) -> tuple[float, float]:
    """Return this processor's seconds per parameter and token: for a prompt read at once, and for a token written."""
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
    """Return the hours for captioning `items` images one by one at `seconds_per_parameter` (two values)."""
    reading, writing = speed
    return items * parameters * (prompt_tokens * reading + new_tokens * writing) / 3600


def check_effort(parameters: int, items: int, estimate: float, allow_slow: bool, instead: str = "") -> None:
    """Warn of the estimated hours; refuse where they are many and not allowed.

    Args:
        instead: one more way out, for the message, with a comma and a space behind it.

    Raises:
        UserError: more than an hour, and the spec doesn't say allow_slow.
    """
    told = (
        f"a model of {parameters / 1e9:.1f} billion parameters on this processor needs about {estimate:.1f} "
        f"hours for {items} items"
    )
    if estimate > BEARABLE_HOURS and not allow_slow:
        raise UserError(
            f"{told}. Run it on a machine with a GPU, {instead}take a smaller model, leave this modality out of the "
            "experiment, or set allow_slow: true to wait for it"
        )
    log.warning(told)
