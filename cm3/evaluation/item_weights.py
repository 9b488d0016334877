"""Item weights in place of embeddings: the scores of a user are the user's row of interactions times a matrix W."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.errors import UserError
from cm3.common.tensors import read_tensors


class ItemWeights:
    """W (I, I) float32, dense or sparse: entry (j, i) is what having item j adds to the score of item i."""

    def __init__(self, matrix: np.ndarray | sp.csr_matrix) -> None:
        self.matrix = matrix

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file of the weights holds: `weights`, or `offsets`, `columns` and `values` of sparse rows."""
        if isinstance(self.matrix, np.ndarray):
            return {"weights": torch.from_numpy(np.ascontiguousarray(self.matrix))}
        parts = {"offsets": self.matrix.indptr, "columns": self.matrix.indices}
        indices = {name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()}
        return indices | {"values": torch.from_numpy(self.matrix.data)}

    def scores(self, history: sp.csr_matrix, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """Return the function from user indices (b,) to scores (b, I) under the interactions `history` (U, I)."""

        def score(users: Tensor) -> Tensor:
            product = sp.csr_matrix(history[users.cpu().numpy()]) @ self.matrix
            dense = product if isinstance(product, np.ndarray) else product.toarray()
            return torch.from_numpy(np.ascontiguousarray(dense, np.float32)).to(device)

        return score


def read_item_weights(path: str | os.PathLike[str], n_items: int) -> tuple[ItemWeights, dict[str, Any]]:
    """Return the weights of `n_items` items, and the file's metadata.

    Raises:
        DamagedFileError: a checksum differs, or the file is not readable.
        UserError: absent, of another number of items, not rows of a matrix, or not finite.
    """
    stored, metadata = read_tensors(path)
    tensors = {name: tensor.numpy() for name, tensor in stored.items()}
    shape = (n_items, n_items)
    if set(tensors) == {"weights"} and tensors["weights"].shape == shape:
        matrix, values = tensors["weights"], tensors["weights"]
    elif set(tensors) == {"offsets", "columns", "values"} and len(tensors["offsets"]) == n_items + 1:
        values = tensors["values"]
        try:
            matrix = sp.csr_matrix((values, tensors["columns"], tensors["offsets"]), shape)
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise UserError(f"{path}: not rows of weights ({error}); delete it and train again") from None
    else:
        held = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(tensors.items()))
        raise UserError(f"{path}: holds {held}, not the weights of {n_items} items; delete it and train again")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: a weight is NaN or infinite; delete it and train again")
    return ItemWeights(matrix), metadata
