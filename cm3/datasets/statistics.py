"""Statistics of a dataset for stats.json: density, distributions, time span, missing item fields."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cm3.datasets.interactions_db import InteractionArrays
from cm3.datasets.reader import Item

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_TEXTS = ("title", "brand", "categories", "description", "features")


def describe(core: InteractionArrays, users: int, items: Sequence[Item]) -> dict[str, Any]:
    """Return density, distributions, the time span, and the number of items without each field.

    Args:
        core: the interactions with dense codes.
        users: number of users.
        items: all items, in order.
    """
    per_item = np.bincount(core.item, minlength=len(items))
    pairs = users * len(items)
    with_text = sum(any(getattr(item, name) for name in _TEXTS) for item in items)
    return {
        "density": len(core) / pairs,
        "sparsity": 1 - len(core) / pairs,
        "items_without_interaction": int((per_item == 0).sum()),
        "interactions_per_user": _distribution(np.bincount(core.user, minlength=users)),
        "interactions_per_item": _distribution(per_item[per_item > 0]),
        "has_ratings": core.rating is not None,
        "ratings": None if core.rating is None else _rating_counts(core.rating),
        "has_timestamps": core.timestamp is not None,
        "timestamps": None
        if core.timestamp is None
        else {"first": int(core.timestamp.min()), "last": int(core.timestamp.max())},
        "has_published_split": core.split is not None,
        "items_with_title": sum(bool(item.title) for item in items),
        "items_with_description": sum(bool(item.description) for item in items),
        "items_with_text": with_text,
        "items_with_image_reference": sum(bool(item.image_urls) for item in items),
        "items_missing": {
            **{name: sum(not getattr(item, name) for item in items) for name in (*_TEXTS, "details")},
            "price": sum(item.price is None for item in items),
            "sales_rank": sum(item.sales_rank is None for item in items),
            "any text": len(items) - with_text,
            "image reference": sum(not item.image_urls for item in items),
        },
    }


def _distribution(counts: np.ndarray) -> dict[str, Any]:
    edges = 2 ** np.arange(int(counts.max()).bit_length() + 1)
    held = np.histogram(counts, edges)[0]
    return {
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "mean": float(counts.mean()),
        "max": int(counts.max()),
        "quantiles": {f"{q:g}": float(np.quantile(counts, q)) for q in _QUANTILES},
        "histogram": {
            f"{low}-{high - 1}" if high > low + 1 else str(low): int(count)
            for low, high, count in zip(edges[:-1], edges[1:], held, strict=True)
        },
    }


def _rating_counts(ratings: np.ndarray) -> dict[str, Any]:
    ratings = ratings[~np.isnan(ratings)]
    values, counts = np.unique(ratings, return_counts=True)
    counted = (
        {f"{value:g}": int(count) for value, count in zip(values, counts, strict=True)} if len(values) <= 20 else None
    )
    return {"mean": float(ratings.mean(dtype=np.float64)), "counts": counted}
