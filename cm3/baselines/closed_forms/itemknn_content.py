"""ItemKNN on content: item weights from the cosines of features."""

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.inputs import Inputs
from cm3.baselines.itemknn_content import ItemKNNContent
from cm3.common.arrays import blocks, zeros
from cm3.common.errors import UserError
from cm3.evaluation.item_weights import ItemWeights
from cm3.similarity.exact import knn


def solve(inputs: Inputs, settings: ItemKNNContent, device: torch.device) -> ItemWeights:
    """Return W (I, I): w_ji = sum_m w_m cos(x_mi, x_mj) / sqrt(W_i W_j) for the k items j nearest to i, 0 elsewhere.

    W_i is the summed weight of the modalities in which item i has a vector, 1 where it has all; a modality counts for a
    pair only where both have one. This is the cosine of the concatenated unit vectors, each scaled by sqrt(w_m).
    Ferrari Dacrema, Cremonesi and Jannach, RecSys 2019, define ItemKNN-CBF on one vector per item; there is no shrink
    term here, as unit vectors make it a constant factor.

    Raises:
        UserError: no more than `settings.k` items have a vector.
    """
    joined = _concatenated(inputs)
    usable = np.flatnonzero(joined.any(axis=1))
    if len(usable) <= settings.k:
        raise UserError(f"model.k = {settings.k}: only {len(usable)} items have a vector; lower it below {len(usable)}")
    on = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64, which exact scores need
    indices, scores = knn(torch.from_numpy(joined[usable]).to(on), settings.k, include_self=False)
    voters, targets = usable[indices.cpu().numpy().ravel()], np.repeat(usable, settings.k)
    matrix = sp.csr_matrix((scores.cpu().numpy().ravel(), (voters, targets)), (len(joined), len(joined)))
    matrix.sort_indices()
    return ItemWeights(matrix)


def _concatenated(inputs: Inputs) -> np.ndarray:
    """Return the concatenated unit vectors of all modalities, each scaled by the root of its weight, (I, d) float32."""
    ends = np.cumsum([x.shape[1] for x in inputs.features.values()])
    joined = zeros((inputs.interactions.shape[1], int(ends[-1])))
    for (m, x), end in zip(inputs.features.items(), ends, strict=True):
        for rows in blocks(len(x)):
            length = np.linalg.norm(x[rows].astype(np.float64), axis=1, keepdims=True)
            unit = x[rows] / np.where(length > 0, length, 1)
            joined[rows, end - x.shape[1] : end] = np.sqrt(inputs.weights[m]) * unit
    return joined
