"""Features of all modalities as one vector per item, whose products are weighted cosines."""

import numpy as np

from cm3.baselines.inputs import Inputs
from cm3.common.arrays import blocks, zeros


def concatenated_unit_vectors(inputs: Inputs) -> np.ndarray:
    """Return the unit vectors of all modalities, each scaled by the root of its weight and joined, (I, d) float32.

    The product of two rows is sum_m w_m cos(x_mi, x_mj). An item without a vector in a modality has zeros there.
    """
    ends = np.cumsum([x.shape[1] for x in inputs.features.values()])
    joined = zeros((inputs.interactions.shape[1], int(ends[-1])))
    for (m, x), end in zip(inputs.features.items(), ends, strict=True):
        for rows in blocks(len(x)):
            length = np.linalg.norm(x[rows].astype(np.float64), axis=1, keepdims=True)
            unit = x[rows] / np.where(length > 0, length, 1)
            joined[rows, end - x.shape[1] : end] = np.sqrt(inputs.weights[m]) * unit
    return joined
