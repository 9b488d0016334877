"""Number format of a model's weights and arithmetic."""

import contextlib
from typing import TYPE_CHECKING

from cm3.common.device import float32_arithmetic

if TYPE_CHECKING:
    import torch


def torch_dtype(precision: str) -> "torch.dtype":
    """Return the dtype of a model's weights for a precision setting."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def arithmetic(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the context of forward passes.

    `autocast` computes products in bfloat16, norms and sums in float32; `tf32` computes products and convolutions on a
    GPU in TF32. `float32` does neither: torch alone would use TF32 in convolutions.
    """
    import torch

    if precision == "autocast":
        return torch.autocast(device, dtype=torch.bfloat16)
    return float32_arithmetic(tf32=precision == "tf32")
