"""Item cards: title, image and description of an item for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table


@dataclass(frozen=True)
class Shop:
    """The tables of a prepared data set, for a page.

    Attributes:
        item_ids, titles, brands, categories: of each item; None if missing.
        user_ids: of each user.
        users, items, times, splits: of each interaction, in row order; NaN if the time is missing.
        popularity: (I,) training interactions of each item.
    """

    item_ids: list[str]
    titles: list[str | None]
    brands: list[str | None]
    categories: list[list[str] | None]
    user_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    splits: np.ndarray
    popularity: np.ndarray

    def card(self, item: int, under: str = "", hit: bool = False) -> dict[str, Any]:
        """Return the card of an item: its title, its index (for the image), and a line below."""
        return {
            "item": item,
            "item_id": self.item_ids[item],
            "title": self.titles[item] or self.item_ids[item],
            "under": under,
            "hit": hit,
        }

    def about(self, item: int) -> dict[str, Any]:
        """Return the card with brand, categories and popularity."""
        return self.card(item) | {
            "brand": self.brands[item],
            "categories": " \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} ".join(self.categories[item] or []),
            "popularity": int(self.popularity[item]),
        }


def read_shop(inputs: Mapping[str, Path]) -> Shop:
    """Read the tables `items`, `users` and `interactions`.

    Raises:
        UserError: a table is missing or unreadable.
    """
    items = read_table(inputs["items"], ITEMS)
    rows = read_table(inputs["interactions"], INTERACTIONS)
    splits = np.asarray(rows.column("split").cast("string").to_pylist(), dtype=object)
    numbers = rows.column("item").to_numpy()
    return Shop(
        item_ids=items.column("item_id").to_pylist(),
        titles=items.column("title").to_pylist(),
        brands=items.column("brand").to_pylist(),
        categories=items.column("categories").to_pylist(),
        user_ids=read_table(inputs["users"], USERS).column("user_id").to_pylist(),
        users=rows.column("user").to_numpy(),
        items=numbers,
        times=rows.column("timestamp").to_numpy(zero_copy_only=False).astype(np.float64),
        splits=splits,
        popularity=np.bincount(numbers[splits == "train"], minlength=len(items)),
    )


def evenly_spaced(candidates: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """Return `count` evenly spaced candidates, including the first and the last; all of them if there are fewer."""
    if len(candidates) <= count:
        return [int(one) for one in candidates]
    return [int(candidates[place]) for place in np.linspace(0, len(candidates) - 1, count).round().astype(int)]
