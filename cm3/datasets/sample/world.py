"""Ground truth of the sample dataset: item attributes, user preferences and interactions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Shown by images only ...
IMAGE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey"),
    "pattern": ("plain", "striped", "dotted", "checked", "zigzag"),
    "shape": ("circle", "square", "triangle", "star", "heart", "hexagon", "cross", "moon"),
}
# ... and by texts only.
TEXT_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": (
        "cushion",
        "night light",
        "wall clock",
        "keyring",
        "serving tray",
        "coaster",
        "candle holder",
        "money box",
        "brooch",
        "mirror",
        "fridge magnet",
        "rug",
    ),
    "material": ("wool", "ceramic", "oak", "steel", "glass", "leather", "cork", "bamboo"),
    "use": (
        "nursery",
        "kitchen",
        "office",
        "camping",
        "bathroom",
        "garden",
        "travel",
        "party",
        "workshop",
        "bedroom",
    ),
}
ATTRIBUTES = {**IMAGE_ATTRIBUTES, **TEXT_ATTRIBUTES}

_USERS_AT_ONCE = 512
_COLD_PENALTY = 4.0
# Preferences have heavy tails, so that the items of a user have attributes in common.
_SHARPNESS = 1.5
_STRENGTH = 2.5  # standard deviation of the preference term of the utility at taste = 1
# Fractions of the preference for image attributes and of that for text attributes.
_IMPORTANCE = {"colour": 0.5, "pattern": 0.3, "shape": 0.2, "kind": 0.4, "material": 0.35, "use": 0.25}


@dataclass(frozen=True)
class World:
    """Ground truth.

    Attributes:
        attributes: name -> (items,) codes into ATTRIBUTES[name].
        popularity: (items,) log-odds of an interaction with the item, equal for all users.
        cold, has_image, has_description: (items,) bool.
        likes: name -> (users, values) preference of each user for each value of an attribute.
        user, item: (N,) interactions, those of a user in time order.
        rating: (N,) 1 to 5.
        time: (N,) Unix seconds.
    """

    attributes: dict[str, np.ndarray]
    popularity: np.ndarray
    cold: np.ndarray
    has_image: np.ndarray
    has_description: np.ndarray
    likes: dict[str, np.ndarray]
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray


def make_world(spec: dict[str, Any]) -> World:
    """Return the ground truth for a seed.

    User u has n_u distinct items, item i with probability proportional to exp(utility), where
    utility = taste * sum_a w_a likes_a[u, value_a(i)] + popularity_i, drawn without replacement (Gumbel top-n).
    Preferences are log-normal, standardised; w_a gives image and text attributes the fractions in `spec`.

    Args:
        spec: a sample dataset's generate_spec().
    """
    streams = np.random.SeedSequence(spec["seed"]).spawn(4)
    for_items, for_tastes, for_purchases, for_reviews = map(np.random.default_rng, streams)
    users, items = spec["users"], spec["items"]
    attributes = {name: for_items.integers(0, len(values), items) for name, values in ATTRIBUTES.items()}
    popularity = spec["popularity"] * for_items.standard_normal(items)
    cold = _some(for_items, items, spec["cold"])
    popularity[cold] -= _COLD_PENALTY
    has_image = ~_some(for_items, items, spec["without_picture"])
    has_description = ~_some(for_items, items, spec["without_description"])
    likes = {name: _likes(for_tastes, users, len(values)) for name, values in ATTRIBUTES.items()}
    weights = _weights(spec["taste"], spec["picture_share"])
    user, item, pleasure = _purchases(for_purchases, spec, attributes, popularity, likes, weights)
    rating, time = _reviews(for_reviews, user, pleasure)
    return World(attributes, popularity, cold, has_image, has_description, likes, user, item, rating, time)


def _some(rng: np.random.Generator, items: int, share: float) -> np.ndarray:
    chosen = np.zeros(items, dtype=bool)
    chosen[rng.permutation(items)[: round(share * items)]] = True
    return chosen


def _likes(rng: np.random.Generator, users: int, values: int) -> np.ndarray:
    drawn = np.exp(_SHARPNESS * rng.standard_normal((users, values)))
    drawn -= drawn.mean(axis=1, keepdims=True)
    found: np.ndarray = (drawn / drawn.std(axis=1, keepdims=True)).astype(np.float32)
    return found


def _weights(taste: float, picture_share: float) -> dict[str, float]:
    share = {name: _IMPORTANCE[name] * picture_share for name in IMAGE_ATTRIBUTES}
    share |= {name: _IMPORTANCE[name] * (1 - picture_share) for name in TEXT_ATTRIBUTES}
    # Variances add up, so the fraction of an attribute is its squared weight.
    return {name: _STRENGTH * taste * share[name] ** 0.5 for name in ATTRIBUTES}


def _purchases(
    rng: np.random.Generator,
    spec: dict[str, Any],
    attributes: dict[str, np.ndarray],
    popularity: np.ndarray,
    likes: dict[str, np.ndarray],
    weights: dict[str, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, items = spec["users"], spec["items"]
    least = min(5, items)
    extra = max(spec["interactions_per_user"] - least, 0)
    counts = np.minimum(least + rng.geometric(1 / (extra + 1), users) - 1, max(items // 3, least))
    bought_by, bought, pleasures = [], [], []
    for start in range(0, users, _USERS_AT_ONCE):
        block = slice(start, min(start + _USERS_AT_ONCE, users))
        taste = sum(weights[name] * likes[name][block][:, codes] for name, codes in attributes.items())
        drawn = taste + popularity + rng.gumbel(size=(block.stop - start, items))
        most = min(int(counts[block].max()), items - 1)
        order = np.argpartition(-drawn, most, axis=1)[:, : most + 1]
        order = np.take_along_axis(order, np.argsort(-np.take_along_axis(drawn, order, axis=1), axis=1), axis=1)
        mine = np.arange(order.shape[1]) < counts[block, None]
        rows = np.nonzero(mine)[0]
        chosen = order[mine]
        bought_by.append(rows + start)
        bought.append(chosen)
        pleasures.append(np.asarray(taste)[rows, chosen])
    user, item, pleasure = np.concatenate(bought_by), np.concatenate(bought), np.concatenate(pleasures)
    shuffled = np.lexsort((rng.random(len(user)), user))  # The time order is independent of the preference.
    return user, item[shuffled], pleasure[shuffled]


def _reviews(rng: np.random.Generator, user: np.ndarray, pleasure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = (pleasure - pleasure.mean()) / (pleasure.std() + 1e-9)
    rating = np.clip(np.rint(4 + 0.6 * spread + 0.8 * rng.standard_normal(len(user))), 1, 5).astype(int)
    # Three years until July 2014, whole days as in the published files.
    day = 86_400
    first, last = 1_309_478_400 // day, 1_404_086_400 // day
    days = rng.integers(first, last, len(user))
    days = days[np.lexsort((days, user))]
    return rating, days * day
