"""Stage `evaluate`: score what a model exported on the validation and test splits, and write recommendations."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional

from cm3.common.cli import stage
from cm3.common.device import select_device, set_threads
from cm3.common.embeddings import read_embeddings
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.strict import validate
from cm3.common.tables import RECOMMENDATIONS, write_table, write_tables
from cm3.config import Evaluation
from cm3.evaluation.item_weights import read_item_weights
from cm3.evaluation.metrics import per_user
from cm3.evaluation.ranking import Ranking, hit_matrix

log = logging.getLogger("cm3.evaluation.evaluate")

Score = Callable[[Tensor], Tensor]
MASKS = ("train", "train+valid")

_PART = 65_536  # users that are judged and written at a time; an Arrow array of strings ends at 2 GiB
_ENTRIES = 2**22  # of lists that are ranked at a time


@dataclass(frozen=True)
class Lists:
    """The best items of users (R,), rising, without their training items: items and scores (R, L), best first.

    Where a list ends the item is -1, the score -inf.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray

    def of(self, users: np.ndarray, length: int, masked: sp.csr_matrix | None = None) -> "Lists":
        """Return some users' lists up to `length`; without (U, I) `masked` items, of which L - length may be in a list."""
        rows = np.searchsorted(self.users, users)
        items, scores = self.items[rows], self.scores[rows]
        if masked is not None:
            gone = hit_matrix(items, masked[users])
            order = gone.argsort(axis=1, kind="stable")[:, :length]
            gone, items, scores = (np.take_along_axis(each, order, 1) for each in (gone, items, scores))
            items[gone], scores[gone] = -1, -np.inf
        return Lists(users, items[:, :length], scores[:, :length])

    def compact(self) -> "Lists":
        """Return a copy that takes half of the memory."""
        return Lists(self.users, self.items.astype(np.int32), self.scores.copy())


@dataclass(frozen=True)
class Measured:
    """Metrics of the users that have truth in a split: user indices (R,), sizes of their truth, (R,) values by name."""

    users: np.ndarray
    n_truth: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence["Measured"]) -> "Measured":
        """Return the metrics of all parts' users."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        return cls(np.concatenate([p.users for p in parts]), np.concatenate([p.n_truth for p in parts]), values)

    def means(self) -> dict[str, float]:
        """Return each metric's mean over the users, in full precision."""
        return {name: float(value.mean()) for name, value in self.values.items()}


def evaluate(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    user_embeddings: Path | None = None,
    item_embeddings: Path | None = None,
    weights: Path | None = None,
    settings: Evaluation,
    metrics_output: Path,
    per_user_output: Path,
    recommendations_output: Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rank all items for every user of the test and validation splits and write metrics and recommendations.

    The scores come from the embeddings of users and items, or from the item `weights` and the training interactions.
    Writes evaluation.json (test, valid, detail, counts), per_user.parquet (user, n_test, a float64 column per
    metric@k of the main test metrics) and recommendations.parquet (user_id, item_id, rank from 1, score).
    Validation always masks the training items; the test mask is `settings.mask`.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: unreadable inputs, embeddings or weights of other users or items, an empty test split, or a
            cosine asked for where there are no embeddings.
    """
    data = read_interactions(interactions, items, users)
    train, test, valid = data.matrix("train"), data.truth("test"), data.truth("valid")
    cold_users = np.diff(train.indptr) == 0
    if not test.nnz:
        raise UserError(
            f"{interactions}: no row of a user with training interactions is in the test split; check the split settings "
            "and prepare the data again"
        )
    metadata: dict[str, Any] = {}
    if weights is not None:
        by_name = {"dot": read_item_weights(weights, len(data.item_ids)).scores(train, device)}
    elif user_embeddings is not None and item_embeddings is not None:
        user_vectors, _ = read_embeddings(user_embeddings, "user_id", data.user_ids)
        item_vectors, metadata = read_embeddings(item_embeddings, "item_id", data.item_ids)
        by_name = _scores(*(torch.as_tensor(vectors, device=device) for vectors in (user_vectors, item_vectors)))
    else:
        raise ValueError("neither the embeddings of users and items nor item weights are given")
    if settings.score not in by_name:
        raise UserError(f"evaluation.score = {settings.score!r}: {weights} has no embeddings to take it of; set dot")

    k, longest = max(settings.ks), max(*settings.ks, settings.top_n)
    tested, validates = (np.diff(split.indptr) > 0 for split in (test, valid))
    asked = np.flatnonzero(tested | validates)
    parts: dict[tuple[str, str], list[Measured]] = {(score, mask): [] for score in by_name for mask in MASKS}
    kept: list[Lists] = []
    validated: list[Measured] = []
    for part in np.split(asked, range(_PART, len(asked), _PART)):
        some, some_valid = part[tested[part]], part[validates[part]]
        for score, of_users in by_name.items():
            main = score == settings.score
            length = longest if main else k
            by_mask = _ranked(of_users, part if main else some, train, valid, length, device)
            for mask, lists in by_mask.items():
                found = lists.of(some, length)
                parts[score, mask].append(_measure(found, test, settings.ks))
                if main and mask == settings.mask:
                    kept.append(found.compact())
            if main and valid.nnz:
                validated.append(_measure(by_mask["train"].of(some_valid, k), valid, settings.ks))
    measured = {name: Measured.joined(found) for name, found in parts.items()}
    primary = measured[settings.score, settings.mask]
    of_valid = Measured.joined(validated) if validated else None
    cold = np.asarray(train.sum(0)).ravel() == 0

    result: dict[str, Any] = {
        "test": primary.means(),
        "valid": of_valid.means() if of_valid else None,
        "detail": {
            "test": {f"score {score}, mask {mask}": found.means() for (score, mask), found in measured.items()},
            "items": _by_kind(kept, test, cold, settings.ks),
        },
        "counts": {
            "users": train.shape[0],
            "items": train.shape[1],
            "test_users": len(primary.users),
            "valid_users": len(of_valid.users) if of_valid else 0,
            "test_interactions": test.nnz,
            "cold_items": int(cold.sum()),
            "cold_users": int(cold_users.sum()),
            "cold_test_users": len(np.intersect1d(data.pairs("test")[0], np.flatnonzero(cold_users))),
            "test_interactions_seen_in_training": int(test.multiply(train).nnz),
        },
        "score": settings.score,
        "mask": settings.mask,
        "best_epoch": metadata.get("epoch"),
    }
    write_json(metrics_output, result)
    _write_per_user(per_user_output, primary)
    _write_recommendations(recommendations_output, kept, data, settings.top_n)
    log.info("test: %s", ", ".join(f"{name} {value:.4f}" for name, value in result["test"].items()))
    return result


def _scores(users: Tensor, items: Tensor) -> dict[str, Score]:
    unit_items = functional.normalize(items, dim=1)
    return {
        "dot": lambda rows: users[rows] @ items.T,
        "cosine": lambda rows: functional.normalize(users[rows], dim=1) @ unit_items.T,
    }


def _ranked(
    score: Score, users: np.ndarray, train: sp.csr_matrix, valid: sp.csr_matrix, length: int, device: str
) -> dict[str, Lists]:
    """Return the lists of users (R,) up to `length` under each mask.

    Both are of one ranking: without the validation items it is what is left of a longer one. Users with as many such
    items are ranked together, so that one with thousands does not lengthen everybody's lists.
    """
    shape = (len(users), length)
    found = {mask: Lists(users, np.full(shape, -1), np.full(shape, -np.inf, np.float32)) for mask in MASKS}
    spare = np.diff(valid.indptr)[users]
    rising = np.argsort(spare, kind="stable")
    while len(rising):
        entries = np.arange(1, len(rising) + 1) * (length + spare[rising])
        rows = np.sort(rising[: max(1, np.searchsorted(entries, _ENTRIES, "right"))])
        rising = rising[len(rows) :]
        ranking = Ranking(users[rows], train, device)
        lists = Lists(users[rows], *ranking.top_by(score, length + int(spare[rows].max())))
        for mask, whole in found.items():
            part = lists.of(lists.users, length, valid if mask == "train+valid" else None)
            whole.items[rows], whole.scores[rows] = part.items, part.scores
    return found


def _measure(found: Lists, truth: sp.csr_matrix, ks: list[int]) -> Measured:
    some = truth[found.users]
    return Measured(found.users, np.diff(some.indptr), per_user(found.items, some, ks))


def _by_kind(kept: Sequence[Lists], truth: sp.csr_matrix, cold: np.ndarray, ks: list[int]) -> dict[str, Any]:
    # The same lists, judged by the cold (never bought in training) and by the other items of the truth alone.
    kinds = {}
    for name, kind in (("cold", cold), ("warm", ~cold)):
        part = sp.csr_matrix(truth @ sp.diags_array(kind.astype(np.float32)))
        part.eliminate_zeros()
        sizes = np.diff(part.indptr)
        judged = [_measure(found.of(found.users[sizes[found.users] > 0], max(ks)), part, ks) for found in kept]
        whole = Measured.joined(judged)
        kinds[name] = {
            "users": len(whole.users),
            "interactions": int(sizes[np.concatenate([found.users for found in kept])].sum()),
            **(whole.means() if len(whole.users) else {}),
        }
    return kinds


def _write_per_user(path: Path, found: Measured) -> None:
    columns = {"user": found.users.astype(np.int32), "n_test": found.n_truth.astype(np.int32), **found.values}
    table = pa.table(columns)
    write_table(path, table, table.schema)


def _write_recommendations(path: Path, kept: Sequence[Lists], data: Interactions, top_n: int) -> None:
    user_ids, item_ids = (pa.array(ids, pa.string()) for ids in (data.user_ids, data.item_ids))
    ranks = np.arange(1, top_n + 1, dtype=np.int32)

    def parts() -> Iterator[pa.Table]:
        for found in kept:
            items, scores = found.items[:, :top_n], found.scores[:, :top_n]
            there = items >= 0
            users = np.broadcast_to(found.users[:, None], items.shape)
            columns = {
                "user_id": user_ids.take(pa.array(users[there])),
                "item_id": item_ids.take(pa.array(items[there])),
                "rank": np.broadcast_to(ranks[: items.shape[1]], items.shape)[there],
                "score": scores[there],
            }
            yield pa.table(columns)

    write_tables(path, parts(), RECOMMENDATIONS)


def main() -> None:
    """Run the stage: spec of `Evaluation`; inputs interactions, items, users, and user_embeddings and item_embeddings, or
    weights; outputs metrics, per_user, recommendations, record.
    """
    with stage("cm3.evaluation.evaluate") as call:
        set_threads(call.runtime.get("threads"))
        # On the CPU by default: results then do not depend on the machine that trained.
        device = select_device(call.runtime.get("device", "cpu"))
        names = ("interactions", "items", "users")
        scored = [n for n in ("user_embeddings", "item_embeddings", "weights") if n in call.inputs]
        result = evaluate(
            **{name: call.inputs[name] for name in names},
            **{name: call.inputs[name] for name in scored},
            settings=validate(Evaluation, call.spec, "evaluation"),
            metrics_output=call.outputs["metrics"],
            per_user_output=call.outputs["per_user"],
            recommendations_output=call.outputs["recommendations"],
            device=device.type,
        )
        call.record.update(counts=result["counts"], device=device.type)


if __name__ == "__main__":
    main()
