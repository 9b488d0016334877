"""Scores of a model's files: functions from user indices to the scores of all items."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cm3.common.embeddings import read_embeddings
from cm3.common.interactions import Interactions
from cm3.evaluation.item_weights import read_item_weights
from cm3.evaluation.products import ProductScores

Score = Callable[[Tensor], Tensor]
"""From user indices (b,) to new scores of all items (b, I)."""


def embedding_scores(users: Tensor, items: Tensor) -> dict[str, Score]:
    """Return by name the scores of embeddings (U, D) and (I, D): dot and cosine."""
    unit_items = functional.normalize(items, dim=1)
    return {"dot": ProductScores(users, items), "cosine": ProductScores(users, unit_items, unit=True)}


def read_scores(
    files: Mapping[str, Path], data: Interactions, device: torch.device | str = "cpu"
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Return the scores of a run by name, and the metadata of its files.

    Args:
        files: `user_embeddings` and `item_embeddings`, with the scores dot and cosine; or `weights` between items, whose
            score is dot: the training interactions of a user times the weights.
        data: the interactions that the run learnt from.
        device: of the scores.

    Raises:
        UserError: a file is absent or damaged, has other users or items, or learnt from other interactions.
        ValueError: neither kind of file is given.
    """
    if "weights" in files:
        weights, metadata = read_item_weights(files["weights"], len(data.item_ids))
        data.check_learnt_from(files["weights"], metadata)
        return {"dot": weights.scores(data.matrix("train"), device)}, metadata
    if not {"user_embeddings", "item_embeddings"} <= files.keys():
        raise ValueError("neither the embeddings of users and items nor item weights are given")
    users, metadata = read_embeddings(files["user_embeddings"], "user_id", data.user_ids)
    data.check_learnt_from(files["user_embeddings"], metadata)
    items, metadata = read_embeddings(files["item_embeddings"], "item_id", data.item_ids)
    data.check_learnt_from(files["item_embeddings"], metadata)
    return embedding_scores(*(torch.as_tensor(vectors, device=device) for vectors in (users, items))), metadata
