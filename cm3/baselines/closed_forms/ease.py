"""EASE: item-item ridge regression without self-similarity, in closed form."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.baselines.ease import EASE, LinearAutoencoder
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
    check_size(inputs.interactions.shape[1], settings)
    return regression(co_occurrence(inputs.interactions, device), settings.l2)


def check_size(n_items: int, settings: LinearAutoencoder) -> None:
    """Raise UserError where there are more items than `settings.max_items`."""
    if n_items > settings.max_items:
        raise UserError(
            f"model.max_items = {settings.max_items}: {settings.name} inverts a matrix of {n_items} x {n_items} items, which "
            f"takes about {memory_gb(n_items):.0f} GB of memory and {float(n_items) ** 3:.0e} operations; use itemknn instead, "
            "or raise model.max_items on a machine with that much memory"
        )


def co_occurrence(interactions: sp.csr_matrix, device: torch.device) -> Tensor:
    """Return X'X (I, I) of (U, I) interactions, in float64 and rows, on the device, or on the CPU where that has no float64."""
    observed = sp.csr_matrix(interactions, dtype=np.float64)
    return torch.from_numpy((observed.T @ observed).toarray(order="C")).to("cpu" if device.type == "mps" else device)


def regression(gram: Tensor, l2: float) -> ItemWeights:
    """Return the item weights B = I - P diag(1 / diag P), P = (G + l2 I)^-1 of a Gram matrix G (I, I), which is overwritten.

    Raises:
        UserError: l2 is so small next to G that the sum has no inverse in float64.
    """
    gram.diagonal().add_(l2)
    # LAPACK's matrices are of columns: the transpose of a symmetric matrix of rows is factored and inverted in place.
    columns = gram.T
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    pivots = columns.diagonal().square()
    if failed or not pivots.min() > len(pivots) * torch.finfo(pivots.dtype).eps * pivots.max():
        raise UserError(
            f"model.l2 = {l2}: too small next to the products of the items, whose matrix has no inverse in float64; raise it, "
            "or lower content_weight if it is set"
        )
    torch.cholesky_inverse(columns, out=columns)
    weights = gram.div_(-gram.diagonal().clone()).float()
    weights.fill_diagonal_(0)
    return ItemWeights(weights.cpu().numpy())


def memory_gb(n_items: int) -> float:
    """Return the peak memory in GB of solving for `n_items`: a matrix in float64 and one in float32."""
    return 12 * n_items**2 / 1e9
