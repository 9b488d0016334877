"""CEASE: EASE on interactions and features together."""

import torch

from cm3.baselines.cease import CEASE
from cm3.baselines.closed_forms.content import concatenated_unit_vectors
from cm3.baselines.closed_forms.ease import check_size, co_occurrence, regression
from cm3.baselines.inputs import Inputs
from cm3.evaluation.item_weights import ItemWeights

BLOCK_ROWS = 1024


def solve(inputs: Inputs, settings: CEASE, device: torch.device) -> ItemWeights:
    """Return the B of `cm3.baselines.closed_forms.ease` for the Gram matrix X'X + alpha S.

    S (I, I) is the cosine of the items' features, sum_m w_m cos(x_mi, x_mj), and alpha is `content_weight` times the
    mean number of users of an item, so that at 1 both matrices have the same trace. B minimises
    ||X - XB||^2 + alpha ||T - TB||^2 + l2 ||B||^2, diag B = 0, where the rows of T (d, I) are numbers of the features,
    as further users. A modality in which an item has no vector adds nothing for it.

    Jeunen, Van Balen and Goethals, Closed-Form Models for Collaborative Filtering with Side-Information, RecSys 2020:
    there alpha is absolute, and T holds tags or categories.

    Raises:
        UserError: more items than `settings.max_items`.
    """
    check_size(inputs.interactions.shape[1], settings)
    gram = co_occurrence(inputs.interactions, device)
    alpha = settings.content_weight * float(gram.diagonal().mean())
    features = torch.from_numpy(concatenated_unit_vectors(inputs)).to(gram.device).double()
    for start in range(0, len(gram), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        gram[rows].addmm_(features[rows], features.T, alpha=alpha)
    return regression(gram, settings.l2)
