"""Evaluation stage: rank all items for every test and validation user, write metrics and recommendations."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cm3.common.cli import stage
from cm3.common.device import select_device, set_threads
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.strict import validate
from cm3.config import Evaluation
from cm3.evaluation.external import read_external
from cm3.evaluation.metrics import per_user
from cm3.evaluation.ranking import Ranking
from cm3.evaluation.recommendations import ids_of, write_recommendations
from cm3.evaluation.rerank import read_reranker
from cm3.evaluation.results import RankedLists, UserMetrics, write_per_user
from cm3.evaluation.scores import Score, read_scores

log = logging.getLogger("cm3.evaluation.evaluate")

Ranker = Callable[[Ranking, int], tuple[np.ndarray, np.ndarray]]
"""From a ranking and a length k to items and scores, (R, k) each, as `Ranking.top_by` gives them."""

MASKS = ("train", "train+valid")

PART_USERS = 65_536  # users per part
LIST_ENTRIES = 2**22  # entries of the lists that are ranked together


def evaluate(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    files: Mapping[str, Path],
    settings: Evaluation,
    metrics_output: Path,
    per_user_output: Path,
    recommendations_output: Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rank all items for every user of the test and validation splits and write metrics and recommendations.

    Args:
        interactions, items, users: the tables of the data set.
        files: what a model exports, as `cm3.evaluation.scores.read_scores` or `cm3.evaluation.rerank.read_reranker` reads it.
        settings: cut-offs, score and mask.
        metrics_output, per_user_output, recommendations_output: files to write.
        device: of the scores.

    Writes evaluation.json (test, valid, detail, counts), per_user.parquet (user, n_test, a float64 column per
    metric@k of the main test metrics) and recommendations.parquet (user, item, rank from 1, score).
    Validation always masks the training items; the test mask is `settings.mask`. The metrics of the other score are in the
    detail, too, unless `settings.also_report` leaves it out.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: unreadable inputs, embeddings or weights of other users or items, an empty test split, or a cosine
            score without embeddings.
    """
    data = read_interactions(interactions, items, users)
    train, test, valid = data.matrix("train"), data.truth("test"), data.truth("valid")
    cold_users = np.diff(train.indptr) == 0
    if not test.nnz:
        raise UserError(
            f"{interactions}: no row of a user with training interactions is in the test split; check the split settings "
            "and prepare the data again"
        )
    by_name, facts = _rankers(files, data, device)
    if settings.score not in by_name:
        raise UserError(
            f"evaluation.score = {settings.score!r}: {', '.join(map(str, files.values()))} hold no embeddings; set score to dot"
        )
    if settings.also_report is not None:
        by_name = {name: of for name, of in by_name.items() if name in (settings.score, *settings.also_report)}

    k, longest = max(settings.ks), max(*settings.ks, settings.top_n)
    tested, validated = (np.diff(split.indptr) > 0 for split in (test, valid))
    users_to_rank = np.flatnonzero(tested | validated)
    test_parts: dict[tuple[str, str], list[UserMetrics]] = {(score, mask): [] for score in by_name for mask in MASKS}
    valid_parts: list[UserMetrics] = []
    recommended: list[RankedLists] = []
    for part in np.split(users_to_rank, range(PART_USERS, len(users_to_rank), PART_USERS)):
        test_users, valid_users = part[tested[part]], part[validated[part]]
        for score, rank in by_name.items():
            main = score == settings.score
            length = longest if main else k
            by_mask = _ranked(rank, part if main else test_users, train, valid, length, device)
            for mask, lists in by_mask.items():
                found = lists.of(test_users, length)
                test_parts[score, mask].append(_measure(found, test, settings.ks))
                if main and mask == settings.mask:
                    recommended.append(found.compact())
            if main and valid.nnz:
                valid_parts.append(_measure(by_mask["train"].of(valid_users, k), valid, settings.ks))
    by_variant = {variant: UserMetrics.concatenated(parts) for variant, parts in test_parts.items()}
    primary = by_variant[settings.score, settings.mask]
    of_valid = UserMetrics.concatenated(valid_parts) if valid_parts else None
    cold = np.asarray(train.sum(0)).ravel() == 0

    result: dict[str, Any] = {
        "test": primary.means(),
        "valid": of_valid.means() if of_valid else None,
        "detail": {
            "test": {f"score {score}, mask {mask}": found.means() for (score, mask), found in by_variant.items()},
            "items": _by_temperature(recommended, test, cold, settings.ks),
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
        **facts,
    }
    write_json(metrics_output, result)
    write_per_user(per_user_output, primary)
    ids = ids_of(data.user_ids, data.item_ids)
    write_recommendations(recommendations_output, recommended, ids, settings.top_n)
    log.info("test: %s", ", ".join(f"{name} {value:.4f}" for name, value in result["test"].items()))
    return result


def _rankers(files: Mapping[str, Path], data: Interactions, device: str) -> tuple[dict[str, Ranker], dict[str, Any]]:
    """Return rankers by score, and facts for evaluation.json."""
    if "rerank" in files:
        reranker = read_reranker(files, data, device)
        chosen = {"of": reranker.base_name, "weights": dict(reranker.weights), "top": reranker.top}
        return {"dot": reranker}, {"best_epoch": None, "rerank": chosen}
    if "external" in files:
        lists = read_external(files["external"], files["lists"], data)
        return {"dot": lists}, {"best_epoch": None, "lists": lists.counts}
    scores, metadata = read_scores(files, data, device)
    return {name: _by(score) for name, score in scores.items()}, {"best_epoch": metadata.get("epoch")}


def _by(score: Score) -> Ranker:
    return lambda ranking, k: ranking.top_by(score, k)


def _ranked(
    rank: Ranker, users: np.ndarray, train: sp.csr_matrix, valid: sp.csr_matrix, length: int, device: str
) -> dict[str, RankedLists]:
    """Return the lists of users (R,) up to `length` under each mask.

    One ranking gives both: the list without validation items is taken from a longer one. Users with similar numbers of
    validation items are ranked together, so that a user with thousands does not lengthen the lists of all.
    """
    shape = (len(users), length)
    found = {mask: RankedLists(users, np.full(shape, -1), np.full(shape, -np.inf, np.float32)) for mask in MASKS}
    spare = np.diff(valid.indptr)[users]
    rising = np.argsort(spare, kind="stable")
    while len(rising):
        entries = np.arange(1, len(rising) + 1) * (length + spare[rising])
        rows = np.sort(rising[: max(1, np.searchsorted(entries, LIST_ENTRIES, "right"))])
        rising = rising[len(rows) :]
        ranking = Ranking(users[rows], train, device)
        lists = RankedLists(users[rows], *rank(ranking, length + int(spare[rows].max())))
        for mask, whole in found.items():
            part = lists.of(lists.users, length, valid if mask == "train+valid" else None)
            whole.items[rows], whole.scores[rows] = part.items, part.scores
    return found


def _measure(found: RankedLists, truth: sp.csr_matrix, ks: list[int]) -> UserMetrics:
    some = truth[found.users]
    return UserMetrics(found.users, np.diff(some.indptr), per_user(found.items, some, ks))


def _by_temperature(
    recommended: Sequence[RankedLists], truth: sp.csr_matrix, cold: np.ndarray, ks: list[int]
) -> dict[str, Any]:
    """Return the metrics of the same lists, with only the cold or only the other items of the truth as relevant ones."""
    kinds = {}
    for name, kind in (("cold", cold), ("warm", ~cold)):
        part = sp.csr_matrix(truth @ sp.diags_array(kind.astype(np.float32)))
        part.eliminate_zeros()
        sizes = np.diff(part.indptr)
        judged = [_measure(found.of(found.users[sizes[found.users] > 0], max(ks)), part, ks) for found in recommended]
        whole = UserMetrics.concatenated(judged)
        kinds[name] = {
            "users": len(whole.users),
            "interactions": int(sizes[np.concatenate([found.users for found in recommended])].sum()),
            **(whole.means() if len(whole.users) else {}),
        }
    return kinds


def main() -> None:
    """Run the stage: spec of `Evaluation`; inputs interactions, items, users, and what the model exports: user_embeddings
    and item_embeddings, weights, or rerank and the files of the models that it names,
    or external and its lists; outputs metrics, per_user, recommendations, record.
    """
    with stage("cm3.evaluation.evaluate") as call:
        set_threads(call.runtime.get("threads"))
        # The workflow hides the GPUs from a job that was allotted none.
        wanted = call.runtime.get("device", "auto")
        device = select_device(wanted, "device")
        if wanted == "auto" and device.type == "mps":
            device = torch.device("cpu")
        names = ("interactions", "items", "users")
        result = evaluate(
            **{name: call.inputs[name] for name in names},
            files={name: path for name, path in call.inputs.items() if name not in names},
            settings=validate(Evaluation, call.spec, "evaluation"),
            metrics_output=call.outputs["metrics"],
            per_user_output=call.outputs["per_user"],
            recommendations_output=call.outputs["recommendations"],
            device=device.type,
        )
        call.record.update(counts=result["counts"], device=device.type)


if __name__ == "__main__":
    main()
