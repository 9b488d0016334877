"""Number format of a model's weights and arithmetic."""

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def torch_dtype(precision: str) -> "torch.dtype":
    """Return the dtype of a model's weights for a precision setting."""
    import torch

    return {"float32": torch.float32, "autocast": torch.float32, "bfloat16": torch.bfloat16}[precision]


def arithmetic(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the context of forward passes: `autocast` computes products in bfloat16, norms and sums in float32."""
    import torch

    if precision == "autocast":
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()
