"""Groups of the users of a dataset by the values of one column: single values, the most frequent ones, or quartiles."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_VALUES = 20
"""Most groups of a column, besides `unknown`."""

OTHER, UNKNOWN = "other", "unknown"

_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?|[+-]?\.\d+([eE][+-]?\d+)?")
_LONG_INTEGER = re.compile(r"[+-]?\d{16,}")
_WITH_COMMA = re.compile(r"[+-]?\d+(,\d+)?")


@dataclass(frozen=True)
class Grouping:
    """The groups of one column.

    Attributes:
        cut: values (a group for each), largest (the most frequent values, and `other`) or quartiles.
        values: number of different values.
        names: of the groups, in order.
        group: (U,) position in `names` of each user's group, int8.
    """

    cut: str
    values: int
    names: Sequence[str]
    group: np.ndarray

    def sizes(self) -> dict[str, int]:
        """Return the number of users in each group."""
        counts = np.bincount(self.group, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))


def group_values(values: Sequence[str | None]) -> Grouping:
    """Return the groups of (U,) values; None is unknown.

    A column with up to `MOST_VALUES` different values has a group for each. Of more, numbers are cut at their quartiles,
    and of text the most frequent values are groups and the others one group, `other`.

    Raises:
        ValueError: more than `MOST_VALUES` values of text that are numbers with a comma, or more than half as many as users,
            as in a column of names.
    """
    known = [value for value in values if value is not None]
    numbers = _numbers(set(known))
    if numbers is None:
        cut, count, names = _groups_of_text(known)
    else:
        cut, count, names = _groups_of_numbers([numbers[value] for value in known], numbers)
    labels = [UNKNOWN if value is None else names[value] for value in values]
    last = {OTHER, UNKNOWN}
    ordered = [name for name in dict.fromkeys(names.values()) if name not in last]
    ordered += sorted(last.intersection(labels))
    position = {name: number for number, name in enumerate(ordered)}
    return Grouping(cut, count, ordered, np.array([position[label] for label in labels], np.int8))


def _groups_of_text(known: Sequence[str]) -> tuple[str, int, dict[str, str]]:
    """Return cut, number of values, and the group of each value, from the most frequent on."""
    counts = Counter(known)
    texts = sorted(counts, key=lambda text: (-counts[text], text))
    if len(texts) <= MOST_VALUES:
        return "values", len(texts), {text: text for text in texts}
    if all(_WITH_COMMA.fullmatch(text) for text in texts) and (comma := next((t for t in texts if "," in t), "")):
        raise ValueError(
            f"has {len(texts)} numbers with a comma, such as {comma!r}, which are read as text; write them with a point, and "
            "without a mark of thousands"
        )
    if 2 * len(texts) > len(known):
        raise ValueError(
            f"has {len(texts)} different texts for {len(known)} users, as a column of ids or names has; name a column of "
            "groups, such as country or age"
        )
    kept = set(texts[: MOST_VALUES - 1])
    return "largest", len(texts), {text: text if text in kept else OTHER for text in texts}


def _groups_of_numbers(known: Sequence[float], numbers: Mapping[str, float]) -> tuple[str, int, dict[str, str]]:
    """Return cut, number of values, and the group of each value, in ascending order."""
    texts = sorted(numbers, key=lambda text: numbers[text])
    different = sorted(set(numbers.values()))
    if len(different) <= MOST_VALUES:
        return "values", len(different), {text: _shown(numbers[text]) for text in texts}
    edges = np.unique(np.quantile(known, (0.25, 0.5, 0.75), method="inverted_cdf")).tolist()
    # The largest value can be that of most users.
    edges = [edge for edge in edges if edge < different[-1]] or [different[-2]]
    names = [f"up to {_shown(edges[0])}"]
    names += [f"over {_shown(low)} to {_shown(high)}" for low, high in itertools.pairwise(edges)]
    names += [f"over {_shown(edges[-1])}"]
    places = np.searchsorted(edges, [numbers[text] for text in texts], side="left").tolist()
    return "quartiles", len(different), {text: names[place] for text, place in zip(texts, places, strict=True)}


def _numbers(texts: set[str]) -> dict[str, float] | None:
    """Return the number of each text; None unless all are finite numbers, and none a code.

    Codes have a leading zero, like 01067, or are integers of 16 digits and more, which float64 does not tell apart.
    """
    if not texts or not all(_NUMBER.fullmatch(text) and not _LONG_INTEGER.fullmatch(text) for text in texts):
        return None
    numbers = {text: float(text) + 0.0 for text in texts}  # + 0.0: without -0
    return numbers if np.isfinite(list(numbers.values())).all() else None


def _shown(number: float) -> str:
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)
