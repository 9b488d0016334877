"""MM-GF: a linear graph filter over the items' co-occurrence and the similarities of their features."""

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.inputs import Inputs
from cm3.baselines.mm_gf import MMGF
from cm3.common.errors import UserError
from cm3.evaluation.item_weights import ItemWeights

CONTENT_WEIGHT, IMAGE_WEIGHT = 600.0, 0.1
BLOCK_ENTRIES = 16_000_000  # float64 entries of a block of rows of an item-item graph


def solve(inputs: Inputs, settings: MMGF, device: torch.device) -> ItemWeights:
    """Return W = P^(s) + content_weight sum_m w_m P_m^(s), (I, I) dense, with ^(s) the power s of each entry.

    P = R~' R~ of the interactions R, and P_m = X~_m X~_m' of the features, where M~ = D_r^-alpha M D_c^(alpha - 1)
    with the row and column sums D_r and D_c of M. The features are first scaled robustly, each column by its median and
    interquartile range, and shifted so that the least entry is 0. An item without a vector has no content edges.

    Roh et al., Training-free Graph Filtering via Multimodal Feature Refinement for Extremely Fast Multimodal
    Recommendation, arXiv 2503.04406, with the settings of the published code, whose filter is linear as here; later
    versions of the paper have polynomials of P. The code takes R from training and validation interactions; here R is
    of training interactions alone. It weighs text by 600 and images by 0.1, which are the defaults here. W is built in
    blocks of rows; it is the only matrix of items by items.

    Raises:
        UserError: more items than `settings.max_items`.
    """
    n = inputs.interactions.shape[1]
    if n > settings.max_items:
        raise UserError(
            f"model.max_items = {settings.max_items}: mm-gf computes a dense matrix of {n} x {n} items, which takes about "
            f"{memory_gb(n):.0f} GB of memory; use itemknn-content instead, or raise model.max_items on a machine with "
            "that much memory"
        )
    # MPS has no float64.
    on = torch.device("cpu") if device.type == "mps" else device
    observed = normalised_interactions(inputs.interactions, settings.alpha)
    by_item = sp.csr_matrix(observed.T)
    shares = {m: content_weight(inputs, settings) * inputs.weights[m] for m in inputs.features}
    contents = [
        (share, torch.from_numpy(refined_features(inputs.features[m], settings.alpha)).to(on))
        for m, share in shares.items()
        if share
    ]
    weights = np.empty((n, n), np.float32)
    size = max(1, BLOCK_ENTRIES // n)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        block = (by_item[rows] @ observed).power(settings.power).toarray()
        for share, values in contents:
            block += share * (values[rows] @ values.T).pow_(settings.power).cpu().numpy()
        weights[rows] = block
    return ItemWeights(weights)


def content_weight(inputs: Inputs, settings: MMGF) -> float:
    """Return the weight of all item graphs of features."""
    if settings.content_weight is not None:
        return settings.content_weight
    return IMAGE_WEIGHT if set(inputs.features) == {"image"} else CONTENT_WEIGHT


def normalised_interactions(interactions: sp.csr_matrix, alpha: float) -> sp.csr_matrix:
    """Return D_u^-alpha R D_i^(alpha - 1) of (U, I) interactions, in float64."""
    observed = sp.csr_matrix(interactions, dtype=np.float64)
    rows, columns = (np.asarray(observed.sum(axis)).ravel() for axis in (1, 0))
    scaled = sp.diags_array(_power(rows, -alpha)) @ observed @ sp.diags_array(_power(columns, alpha - 1))
    return sp.csr_matrix(scaled)


def refined_features(features: np.ndarray, alpha: float) -> np.ndarray:
    """Return scaled, shifted and normalised features (I, d) in float64; a row of zeros, which has no vector, stays zero."""
    usable = features.any(axis=1)
    refined = np.zeros(features.shape)
    if usable.any():
        values = features[usable].astype(np.float64)
        low, median, high = np.percentile(values, [25, 50, 75], axis=0)
        spread = high - low
        values = (values - median) / np.where(spread > 0, spread, 1)
        values -= values.min()
        refined[usable] = values * _power(values.sum(1), -alpha)[:, None] * _power(values.sum(0), alpha - 1)
    return refined


def _power(sums: np.ndarray, exponent: float) -> np.ndarray:
    """Return sums^exponent, and 1 where a sum is 0."""
    return np.where(sums > 0, sums, 1) ** exponent


def memory_gb(n_items: int) -> float:
    """Return the memory in GB of solving for `n_items` without the features: W, and its copy in the model file."""
    return 8 * n_items**2 / 1e9
