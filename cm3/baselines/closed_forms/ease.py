"""EASE: item-item ridge regression without self-similarity, in closed form."""

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.ease import EASE
from cm3.baselines.inputs import Inputs
from cm3.common.errors import UserError
from cm3.evaluation.item_weights import ItemWeights


def solve(inputs: Inputs, settings: EASE, device: torch.device) -> ItemWeights:
    """Return B = I - P diag(1 / diag P), P = (X'X + lambda I)^-1: it minimises ||X - XB||^2 + lambda ||B||^2, diag B = 0.

    Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019, equation 8. Solved in float64 by a Cholesky
    factor, stored in float32.

    Raises:
        UserError: more items than `settings.max_items`.
    """
    n = inputs.interactions.shape[1]
    if n > settings.max_items:
        raise UserError(
            f"model.max_items = {settings.max_items}: ease inverts a matrix of {n} x {n} items, which takes about "
            f"{memory_gb(n):.0f} GB of memory and {float(n) ** 3:.0e} operations; use itemknn instead, or raise "
            "model.max_items on a machine with that much memory"
        )
    observed = sp.csr_matrix(inputs.interactions, dtype=np.float64)
    # MPS has no float64.
    on = torch.device("cpu") if device.type == "mps" else device
    gram = torch.from_numpy((observed.T @ observed).toarray()).to(on)
    gram.diagonal().add_(settings.l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram, out=gram))
    weights = inverse.div_(-inverse.diagonal().clone()).float()
    weights.fill_diagonal_(0)
    return ItemWeights(weights.cpu().numpy())


def memory_gb(n_items: int) -> float:
    """Return the peak memory in GB of solving for `n_items`: three float64 matrices."""
    return 24 * n_items**2 / 1e9
