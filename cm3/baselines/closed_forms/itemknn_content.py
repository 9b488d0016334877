"""ItemKNN on content: item weights from the cosines of features."""

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.closed_forms.content import concatenated_unit_vectors
from cm3.baselines.inputs import Inputs
from cm3.baselines.itemknn_content import ItemKNNContent
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
    joined = concatenated_unit_vectors(inputs)
    usable = np.flatnonzero(joined.any(axis=1))
    if len(usable) <= settings.k:
        raise UserError(f"model.k = {settings.k}: only {len(usable)} items have a vector; lower it below {len(usable)}")
    on = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64, which exact scores need
    indices, scores = knn(torch.from_numpy(joined[usable]).to(on), settings.k, include_self=False)
    voters, targets = usable[indices.cpu().numpy().ravel()], np.repeat(usable, settings.k)
    matrix = sp.csr_matrix((scores.cpu().numpy().ravel(), (voters, targets)), (len(joined), len(joined)))
    matrix.sort_indices()
    return ItemWeights(matrix)
