"""The nearest items of an item, by each modality and by the trained model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cm3.common.tables import read_parquet
from cm3.reports.pages.item_cards import Shop, evenly_spaced

ITEMS_SHOWN, NEIGHBOURS_SHOWN = 12, 6


def chosen_items(popularity: np.ndarray, with_image: set[int]) -> list[int]:
    """Return example items, evenly spaced by popularity; only items with images if there are any."""
    order = np.lexsort((np.arange(len(popularity)), -popularity))
    shown = np.array([item for item in order if item in with_image], dtype=np.int64)
    return evenly_spaced(shown if len(shown) else order, ITEMS_SHOWN)


def by_graph(path: Path, chosen: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    """Return (neighbour, cosine) of each chosen item from a similarity file, best first, without the item itself."""
    table = read_parquet(path, rows=pc.field("item").isin(list(chosen)))
    found: dict[int, list[tuple[int, float]]] = {item: [] for item in chosen}
    columns = (table.column(name).to_pylist() for name in ("item", "neighbour", "score"))
    for item, neighbour, score in zip(*columns, strict=True):
        if item != neighbour:
            found[item].append((neighbour, score))
    return {item: pairs[:NEIGHBOURS_SHOWN] for item, pairs in found.items()}


def by_embedding(vectors: np.ndarray, chosen: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    """Return (neighbour, cosine) of each chosen item from (I, D) embeddings, ties by lower index, without itself."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1)
    found = {}
    for item in chosen:
        cosines = unit @ unit[item]
        cosines[item] = -np.inf
        order = np.lexsort((np.arange(len(cosines)), -cosines))[:NEIGHBOURS_SHOWN]
        found[item] = [(int(other), float(cosines[other])) for other in order if np.isfinite(cosines[other])]
    return found


def neighbour_panels(
    shop: Shop, chosen: Sequence[int], lists: Mapping[str, Mapping[int, list[tuple[int, float]]]]
) -> list[dict[str, Any]]:
    """Return for each chosen item its card and its neighbours by each method."""
    return [
        {
            "about": shop.about(item),
            "ways": [
                {"name": name, "cards": [shop.card(other, f"cosine {score:.2f}") for other, score in found[item]]}
                for name, found in lists.items()
            ],
        }
        for item in chosen
    ]
