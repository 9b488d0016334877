"""Building blocks of several networks: embeddings, projections, sparse products and the BPR loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cm3.model.graph import SparseMatrix, propagate
from cm3.model.lookup import lookup as lookup


def xavier_embedding(n: int, d: int) -> nn.Parameter:
    """Return an (n, d) parameter drawn uniformly by Glorot and Bengio's rule, from torch's global generator."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(n, d)))


def bpr_loss(users: Tensor, items: Tensor, others: Tensor) -> Tensor:
    """Return the BPR loss -mean_b log sigmoid(u_b i_b - u_b j_b) of (B, d) users, their items and other items.

    Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
    """
    return -functional.logsigmoid((users * (items - others)).sum(1)).mean()


def l2_penalty(*tables: Tensor) -> Tensor:
    """Return the L2 penalty of a batch, sum over its (B, ..) rows of ||row||^2 / 2, over B."""
    return torch.stack([table.square().sum() for table in tables]).sum() / (2 * len(tables[0]))


def layer_mean(adjacency: SparseMatrix, users: Tensor, items: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Return users and items after averaging A^l e over layers l = 0..layers of their graph (LightGCN)."""
    nodes = propagate(adjacency, torch.cat([users, items]), layers) / (layers + 1)
    return nodes[: len(users)], nodes[len(users) :]


class SparseProduct(nn.Module):
    """Product with a constant sparse matrix (N, K); the gradient is the product with its transpose."""

    def __init__(self, matrix: sp.csr_matrix) -> None:
        super().__init__()
        self.matrix = SparseMatrix(matrix)
        self.transposed = SparseMatrix(sp.csr_matrix(matrix.T))

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, d) product with x (K, d)."""
        product: Tensor = _SparseProduct.apply(x, self.matrix, self.transposed)
        return product


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: SparseMatrix, transposed: SparseMatrix) -> Tensor:
        ctx.transposed = transposed
        return matrix.product(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed.product(grad.contiguous()), None, None


class Projection(nn.Module):
    """Maps one modality's features (I, d_m) to (I, d), linearly; the features are a buffer, or a parameter, too."""

    features: Tensor

    def __init__(self, features: np.ndarray, d: int, trained: bool) -> None:
        super().__init__()
        values = torch.from_numpy(features.copy() if trained else features)
        if trained:
            self.features = nn.Parameter(values)
        else:
            self.register_buffer("features", values, persistent=False)
        self.linear = nn.Linear(values.shape[1], d)

    def forward(self) -> Tensor:
        """Return the projected features of all items."""
        projected: Tensor = self.linear(self.features)
        return projected


def projections(features: Mapping[str, np.ndarray], d: int, trained: bool) -> nn.ModuleList:
    """Return a `Projection` for each modality, in order."""
    return nn.ModuleList(Projection(x, d, trained) for x in features.values())


def by_name(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the components of a loss by name."""
    return dict(zip(names, values, strict=True))
