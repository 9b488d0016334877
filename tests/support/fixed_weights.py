"""Weights that do not depend on how a library initialises them, for golden outputs of tiny models."""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def fill(file: Path) -> None:
    """Replace all floating-point tensors of a safetensors file by numbers drawn from a seed of their name."""
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            drawn = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(tensor.shape))
            values = torch.from_numpy(np.asarray(drawn)).to(tensor.dtype) * 0.15
            # Norms scale by about 1, and variances are positive.
            scale = tensor.ndim == 1 and name.endswith(("weight", "running_var"))
            weights[name] = values.abs() + 0.8 if scale else values
    save_file(weights, file, metadata={"format": "pt"})
