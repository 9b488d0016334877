"""Queries of a trained model: recommendations for users and histories, similar items, metrics on a test set."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import scipy.sparse as sp

from cm3.evaluation.metrics import per_user
from cm3.library.ids import id_columns, id_texts, is_one_id, known_rows, pair_matrix, rows_of
from cm3.library.recommender import Recommender
from cm3.library.scoring import best_by, best_items, products

log = logging.getLogger("cm3.library")

Scored = list[tuple[str, float]]
"""Items as (item id, score), best first."""


@overload
def recommend(
    model: Recommender,
    users: str | int,
    k: int = ...,
    exclude_seen: bool = ...,
    *,
    only_items: Sequence[Any] | None = ...,
    exclude_items: Sequence[Any] | None = ...,
) -> Scored: ...
@overload
def recommend(
    model: Recommender,
    users: Sequence[Any],
    k: int = ...,
    exclude_seen: bool = ...,
    *,
    only_items: Sequence[Any] | None = ...,
    exclude_items: Sequence[Any] | None = ...,
) -> list[Scored]: ...
def recommend(
    model: Recommender,
    users: Any,
    k: int = 10,
    exclude_seen: bool = True,
    *,
    only_items: Sequence[Any] | None = None,
    exclude_items: Sequence[Any] | None = None,
) -> Scored | list[Scored]:
    """Return each user's k best items as (item id, score), best first; fewer where fewer are left.

    Args:
        model: as `fit` or `load` gives it.
        users: user ids, for a list of lists; or one id, for one list.
        k: length of the lists.
        exclude_seen: exclude the items that a user has interacted with.
        only_items: recommend these items only, such as those in stock.
        exclude_items: never recommend these items.

    Raises:
        ValueError: an unknown user or item, k below 1, or `exclude_seen` of a model without the items that users have
            seen.
    """
    _check_length(k)
    one = is_one_id(users)
    rows = rows_of(id_texts([users] if one else users, "users"), model.user_rows, "user")
    if exclude_seen and model.seen is None:
        raise ValueError(
            "the items that users have seen are not known; load with interactions=..., or set exclude_seen=False"
        )
    seen = sp.csr_matrix(model.seen[rows]) if model.seen is not None else None
    masked = seen if exclude_seen and seen is not None else _nothing(len(rows), model)
    lists = _ranked(model, rows, seen, masked, _allowed(model, only_items, exclude_items), k)
    return lists[0] if one else lists


def recommend_for(
    model: Recommender,
    history: Sequence[Any],
    k: int = 10,
    exclude_seen: bool = True,
    *,
    only_items: Sequence[Any] | None = None,
    exclude_items: Sequence[Any] | None = None,
) -> Scored:
    """Return the k best items as (item id, score) for a user who was not in training, from the items of a history.

    The vector of such a user is the mean of the unit vectors of these items; a model with item weights adds the rows of
    these items, as it does for known users.

    Args:
        model: as `fit` or `load` gives it.
        history: ids of the items that the user has interacted with, at least one; the order has no effect.
        k, only_items, exclude_items: as for `recommend`.
        exclude_seen: exclude the items of the history.

    Raises:
        ValueError: an empty history, an unknown item, or k below 1.
    """
    _check_length(k)
    items = np.unique(rows_of(id_texts(history, "history"), model.item_rows, "item"))
    if not len(items):
        raise ValueError("history: has no items; give at least one, or recommend the most popular items")
    seen = pair_matrix(np.zeros(len(items), np.int64), items, (1, len(model.item_ids)))
    masked = seen if exclude_seen else _nothing(1, model)
    allowed = _allowed(model, only_items, exclude_items)

    def vector(one: Recommender) -> np.ndarray:
        found: np.ndarray = one.unit_items[items].mean(0, keepdims=True)
        return found

    return _named(model, *best_items(model, vector, seen, masked, allowed, k))[0]


@overload
def similar_items(model: Recommender, items: str | int, k: int = ...) -> Scored: ...
@overload
def similar_items(model: Recommender, items: Sequence[Any], k: int = ...) -> list[Scored]: ...
def similar_items(model: Recommender, items: Any, k: int = 10) -> Scored | list[Scored]:
    """Return the k items nearest to each item by the cosine of their trained vectors, as (item id, cosine).

    Of a model with item weights: the items to whose scores the item adds most, as (item id, weight).

    Args:
        model: as `fit` or `load` gives it.
        items: item ids, for a list of lists; or one id, for one list.
        k: length of the lists.

    Raises:
        ValueError: an unknown item, or k below 1.
    """
    _check_length(k)
    one = is_one_id(items)
    rows = rows_of(id_texts([items] if one else items, "items"), model.item_rows, "item")
    itself = pair_matrix(np.arange(len(rows)), rows, (len(rows), len(model.item_ids)))
    if model.weights is not None:
        score = model.weights.scores(itself)
    else:
        score = products(model.unit_items[rows], model.unit_items)
    lists = _named(model, *best_by(score, itself, None, k))
    return lists[0] if one else lists


def evaluate(model: Recommender, test: Mapping[str, Sequence[Any]], ks: Sequence[int] = (10, 20)) -> dict[str, float]:
    """Return the mean of each metric over the users of a test set, as {"recall@10": ..., "ndcg@10": ...}.

    All items are ranked for each user, except those that the user has seen and that are not in the test set. Rows with a
    user that the model does not know are left out, and an item that it does not know is never recommended; both are
    logged.

    Args:
        model: as `fit` or `load` gives it.
        test: interactions that the model was not trained with, as for `fit`.
        ks: cut-offs.

    Raises:
        ValueError: no user of the test set is known, missing ids, or a cut-off below 1 or above the number of items.
    """
    users, items = id_columns(test, "test")
    user, item = known_rows(users, model.user_rows), known_rows(items, model.item_rows)
    if (user < 0).all():
        rows_of(users, model.user_rows, "user")
    known = (user >= 0) & (item >= 0)
    n_items = len(model.item_ids)
    wrong = [k for k in ks if not 0 < k <= n_items]
    if wrong or not len(ks):
        raise ValueError(f"ks = {list(ks)}: must be cut-offs between 1 and the {n_items} items")
    # Unknown items count as relevant ones that are missed: each gets a column of its own after the known ones.
    others = sorted({name for name, row in zip(items, item, strict=True) if row < 0})
    columns = {name: n_items + n for n, name in enumerate(others)}
    column = np.asarray([columns.get(name, row) for name, row in zip(items, item, strict=True)], np.int64)
    rows, place = np.unique(user[user >= 0], return_inverse=True)
    truth = pair_matrix(place, column[user >= 0], (len(rows), n_items + len(others)))
    inside = sp.csr_matrix(truth[:, :n_items])
    seen = sp.csr_matrix(model.seen[rows]) if model.seen is not None else _nothing(len(rows), model)
    overlap = seen.multiply(inside).nnz
    masked = sp.csr_matrix(seen - seen.multiply(inside))
    masked.eliminate_zeros()
    if not known.all():
        log.warning(
            "%d of %d test interactions are of unknown users and left out, %d of unknown items and count as missed",
            (user < 0).sum(),
            len(user),
            ((user >= 0) & (item < 0)).sum(),
        )
    if overlap:
        log.warning(
            "%d of %d test interactions are known to the model; if it was trained with them, the metrics are too high",
            overlap,
            len(user),
        )
    best, _ = best_items(model, lambda one: one.users[rows], masked, masked, None, max(ks))
    return {name: float(values.mean()) for name, values in per_user(best, truth, sorted(set(ks))).items()}


def _ranked(
    model: Recommender,
    rows: np.ndarray,
    seen: sp.csr_matrix | None,
    masked: sp.csr_matrix,
    allowed: np.ndarray | None,
    k: int,
) -> list[Scored]:
    if seen is None and any(one.weights is not None for one in (model, *_parts(model))):
        raise ValueError("the items that users have seen are not known, and this model computes the scores from them")
    history = seen if seen is not None else masked
    return _named(model, *best_items(model, lambda one: one.users[rows], history, masked, allowed, k))


def _parts(model: Recommender) -> list[Recommender]:
    return list(model.reranking.parts.values()) if model.reranking else []


def _named(model: Recommender, best: np.ndarray, scores: np.ndarray) -> list[Scored]:
    """Return lists (R, k) of items and their scores with the ids of the items."""
    return [
        [(model.item_ids[item], float(value)) for item, value in zip(row, values, strict=True) if item >= 0]
        for row, values in zip(best.tolist(), scores.tolist(), strict=True)
    ]


def _allowed(model: Recommender, only: Sequence[Any] | None, without: Sequence[Any] | None) -> np.ndarray | None:
    """Return which items may be recommended, (I,) bool; None for all."""
    if only is None and without is None:
        return None
    allowed = np.full(len(model.item_ids), only is None)
    if only is not None:
        allowed[rows_of(id_texts(only, "only_items"), model.item_rows, "item")] = True
    if without is not None:
        allowed[rows_of(id_texts(without, "exclude_items"), model.item_rows, "item")] = False
    return allowed


def _nothing(users: int, model: Recommender) -> sp.csr_matrix:
    return sp.csr_matrix((users, len(model.item_ids)), dtype=np.float32)


def _check_length(k: int) -> None:
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
