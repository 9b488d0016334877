"""The metrics of recommending the most popular items, from the interactions alone, by the protocol of the evaluation."""

from collections.abc import Sequence

import numpy as np

from cm3.common.interactions import Interactions
from cm3.evaluation.metrics import per_user
from cm3.evaluation.results import RankedLists

_ENTRIES = 2**22  # entries of the lists that are ranked together


def popularity_metrics(data: Interactions, ks: Sequence[int], mask: str) -> dict[str, float]:
    """Return the test metrics of MostPop by name, such as "recall@20": equal to those of the baseline `mostpop`.

    Items are ranked by their number of training users, of equal ones the lower index first.

    Args:
        data: the interactions with their split.
        ks: cut-offs.
        mask: splits whose items are left out of a user's list: "train" or "train+valid".
    """
    train, test = data.matrix("train"), data.truth("test")
    counts = np.asarray(train.sum(0)).ravel()
    order = np.lexsort((np.arange(len(counts)), -counts))
    masked = data.matrix(*mask.split("+"))
    users = np.flatnonzero(np.diff(test.indptr))
    users = users[
        np.argsort(np.diff(masked.indptr)[users], kind="stable")
    ]  # those with lists of similar length together
    sums: dict[str, float] = {}
    start = 0
    while start < len(users):
        longest = max(ks) + np.diff(masked.indptr)[users[start:]]
        entries = np.arange(1, len(longest) + 1) * longest
        part = np.sort(users[start : start + max(1, int(np.searchsorted(entries, _ENTRIES, "right")))])
        start += len(part)
        width = max(ks) + int(np.diff(masked.indptr)[part].max())
        items = np.full((len(part), width), -1, np.int64)
        items[:, : min(width, len(order))] = order[:width]
        lists = RankedLists(part, items, np.zeros(items.shape, np.float32)).of(part, max(ks), masked)
        for name, values in per_user(lists.items, test[part], ks).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {name: total / len(users) for name, total in sums.items()}
