"""Item cards: title, image and description of an item for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.interactions import Interactions, read_interactions
from cm3.common.tables import INTERACTIONS, ITEMS, read_table


@dataclass(frozen=True)
class Shop:
    """The tables of a prepared data set, for a page.

    Attributes:
        titles, brands, categories: of each item; None if missing.
        interactions: with the ids of users and items.
        times: (E,) of each interaction, in row order; NaN if missing.
        popularity: (I,) training interactions of each item.
    """

    titles: list[str | None]
    brands: list[str | None]
    categories: list[list[str] | None]
    interactions: Interactions
    times: np.ndarray
    popularity: np.ndarray

    @property
    def item_ids(self) -> list[str]:
        """The id of each item."""
        return self.interactions.item_ids

    @property
    def user_ids(self) -> list[str]:
        """The id of each user."""
        return self.interactions.user_ids

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
    items = read_table(inputs["items"], ITEMS, ["title", "brand", "categories"])
    interactions = read_interactions(inputs["interactions"], inputs["items"], inputs["users"])
    times = read_table(inputs["interactions"], INTERACTIONS, ["timestamp"]).column("timestamp")
    return Shop(
        titles=items.column("title").to_pylist(),
        brands=items.column("brand").to_pylist(),
        categories=items.column("categories").to_pylist(),
        interactions=interactions,
        times=times.to_numpy(zero_copy_only=False).astype(np.float64, copy=False),
        popularity=np.bincount(interactions.pairs("train")[1], minlength=len(items)),
    )


def evenly_spaced(candidates: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """Return `count` evenly spaced candidates, including the first and the last; all of them if there are fewer."""
    if len(candidates) <= count:
        return [int(one) for one in candidates]
    return [int(candidates[place]) for place in np.linspace(0, len(candidates) - 1, count).round().astype(int)]
