"""Re-ranking: the first items of a model's lists in the order of its own and other models' standardised scores.

For a user u and the `top` items C that the base model ranks first, the score of an item i in C is

    z_base(u, i) + sum over parts p of w_p z_p(u, i),    z_m(u, i) = (s_m(u, i) - mean) / standard deviation over C.

The items after C keep the order of the base model. The weights w are chosen on the validation split.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.files import read_json
from cm3.common.interactions import Interactions
from cm3.evaluation.hits import hit_matrix
from cm3.evaluation.products import padded_scores
from cm3.evaluation.ranking import Ranking, block_users
from cm3.evaluation.registry import metric_class
from cm3.evaluation.scores import Score, read_scores

MODEL = "rerank"
"""Name of the input of a stage that holds the chosen weights; the others are `{model}.{file}` of the models in it."""


class Reranker:
    """Lists of a base model, the first items of which are ordered by the weighted scores of all models.

    Args:
        base: scores of the base model.
        parts: scores of the other models by name.
        top: how many of the base model's items are ordered anew.
        weights: w_p by name; a part without one counts for nothing.
        base_name: name of the base model.
    """

    def __init__(
        self,
        base: Score,
        parts: Mapping[str, Score],
        top: int,
        weights: Mapping[str, float],
        base_name: str = "",
    ) -> None:
        self.base, self.parts, self.top, self.weights, self.base_name = base, parts, top, weights, base_name

    def __call__(self, ranking: Ranking, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (items, scores) of the k best items of each user, as `Ranking.top_by` does.

        Scores after the first `top` items continue those before them, one apart, because they are not comparable.
        """
        items, scores = ranking.top_by(self.base, max(k, self.top))
        candidates = Candidates.of(ranking, items[:, : self.top], scores[:, : self.top], self.parts)
        order, total = candidates.order(self.weights)
        reordered = np.take_along_axis(items[:, : self.top], order, 1)
        items = np.concatenate([reordered, items[:, self.top :]], 1)
        last = total[:, -1:] if total.shape[1] else np.zeros((len(items), 1), np.float32)
        rest = np.where(np.isfinite(last), last, 0) - np.arange(1, scores.shape[1] - self.top + 1, dtype=np.float32)
        scores = np.concatenate([total, rest], 1).astype(np.float32)
        scores[items < 0] = -np.inf
        return items[:, :k], scores[:, :k]


@dataclass(frozen=True)
class Candidates:
    """Standardised scores of the first K items of R users.

    Attributes:
        base: (R, K) of the base model; -inf where a list has ended.
        parts: (R, K) of each other model by name; 0 where a list has ended.
    """

    base: np.ndarray
    parts: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, ranking: Ranking, items: np.ndarray, scores: np.ndarray, parts: Mapping[str, Score]) -> "Candidates":
        """Return the candidates of a ranking's users: items (R, K), -1 after the end of a list, and their scores."""
        there = items >= 0
        own = np.where(there, standardised(scores, there), -np.inf).astype(np.float32)
        others = {
            name: standardised(scores_of(score, ranking.users, items, ranking.n_items), there)
            for name, score in parts.items()
        }
        return cls(own, others)

    def order(self, weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return the order (R, K) of the candidates, best first, and their scores in that order.

        Equal scores keep the order of the base model.
        """
        total = self.base
        for name, values in self.parts.items():
            if weights.get(name):
                total = total + np.float32(weights[name]) * values
        order = np.argsort(-total, axis=1, kind="stable")
        return order, np.take_along_axis(total, order, 1)


def standardised(scores: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return (R, K) float32 scores with mean 0 and standard deviation 1 over the entries of each row that are `there`.

    Rows of equal scores are 0, and so are entries that are not there.
    """
    values = np.where(there, scores, 0).astype(np.float64)
    count = np.maximum(there.sum(1, keepdims=True), 1)
    centred = np.where(there, values - values.sum(1, keepdims=True) / count, 0)
    deviation = np.sqrt(np.square(centred).sum(1, keepdims=True) / count)
    scale = np.abs(values).max(1, keepdims=True, initial=0)
    some = deviation > 1e-7 * scale  # less is rounding of equal scores
    scaled: np.ndarray = np.divide(centred, deviation, out=np.zeros_like(centred), where=some)
    return scaled.astype(np.float32)


@torch.no_grad()
def scores_of(score: Score, users: Tensor, items: np.ndarray, n_items: int) -> np.ndarray:
    """Return the scores (R, K) float32 of items (R, K) for users (R,), a block of users at a time; 0 for item -1."""
    found = np.zeros(items.shape, np.float32)
    block = block_users(n_items, users.device.type)
    for start in range(0, len(users), block):
        rows = users[start : start + block]
        values = padded_scores(score, rows)
        wanted = torch.as_tensor(items[start : start + block].clip(min=0), device=values.device)
        found[start : start + block] = values.gather(1, wanted).float().cpu().numpy()
    found[items < 0] = 0
    return found


def choose_weights(
    candidates: Candidates,
    items: np.ndarray,
    truth: sp.csr_matrix,
    monitor: str,
    grid: Sequence[float],
    given: Mapping[str, float],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the weights with the best mean metric on a split, and all that were tried with their values.

    Of equal values the smallest weights are chosen.

    Args:
        candidates: of the split's users.
        items: (R, K) the same candidates' items.
        truth: (R, I) relevant items of these users.
        monitor: metric at a cut-off, such as recall@20.
        grid: weights to try for each part that has none; all combinations are tried.
        given: weights of the parts that have one.
    """
    metric, k = metric_class(monitor), int(monitor.partition("@")[2])
    hits, n_truth = hit_matrix(items, truth), np.diff(truth.indptr)
    values: list[float] = []
    combinations = list(_combinations(list(candidates.parts), grid, given))
    for weights in _combinations(list(candidates.parts), grid, given):
        order, _ = candidates.order(weights)
        values.append(float(metric.values(np.take_along_axis(hits, order[:, :k], 1), n_truth, k).mean()))
    best = max(range(len(values)), key=lambda n: (values[n], -sum(combinations[n].values())))
    tried = [{"weights": weights, monitor: value} for weights, value in zip(combinations, values, strict=True)]
    return combinations[best], tried


def fit_weights(
    base: Score,
    parts: Mapping[str, Score],
    train: sp.csr_matrix,
    truth: sp.csr_matrix,
    *,
    top: int,
    monitor: str,
    grid: Sequence[float],
    given: Mapping[str, float],
) -> tuple[dict[str, float], list[dict[str, Any]], float]:
    """Return the weights with the best mean metric over the users with truth, all that were tried, and the value without.

    Args:
        base, parts: scores of the models, on the CPU.
        train: (U, I) interactions that are left out of the lists.
        truth: (U, I) relevant items, of one user at least.
        top: how many of the base model's items are ordered anew.
        monitor, grid, given: as in `choose_weights`.
    """
    tested = np.flatnonzero(np.diff(truth.indptr))
    ranking, relevant = Ranking(tested, train), sp.csr_matrix(truth[tested])
    items, values = ranking.top_by(base, top)
    candidates = Candidates.of(ranking, items, values, parts)
    chosen, tried = choose_weights(candidates, items, relevant, monitor, grid, given)
    plain = choose_weights(candidates, items, relevant, monitor, [0.0], {})[1][0][monitor]
    return chosen, tried, plain


def scores_by_model(
    files: Mapping[str, Path], scores: Mapping[str, str], data: Interactions, device: torch.device | str
) -> dict[str, Score]:
    """Return the score of each model.

    Args:
        files: `{model}.user_embeddings` and `{model}.item_embeddings`, or `{model}.weights`.
        scores: model -> dot or cosine.
        data: the interactions that the models learnt from.
        device: of the scores.

    Raises:
        UserError: as `cm3.evaluation.scores.read_scores`.
    """
    found = {}
    for name, score in scores.items():
        own = {key.removeprefix(f"{name}."): path for key, path in files.items() if key.startswith(f"{name}.")}
        found[name] = read_scores(own, data, device)[0][score]
    return found


def read_reranker(files: Mapping[str, Path], data: Interactions, device: torch.device | str) -> Reranker:
    """Return the reranker that `cm3.evaluation.rerank_stage` fitted.

    Args:
        files: the fitted weights under `MODEL`, and the files of the models as in `scores_by_model`.
        data, device: as there.

    Raises:
        UserError: as there.
    """
    fitted = read_json(files[MODEL])
    scores = scores_by_model(files, fitted["scores"], data, device)
    base = fitted["of"]
    parts = {name: score for name, score in scores.items() if name != base}
    return Reranker(scores[base], parts, fitted["top"], fitted["weights"], base)


def _combinations(
    names: Sequence[str], grid: Sequence[float], given: Mapping[str, float]
) -> Iterable[dict[str, float]]:
    choices = [[given[name]] if name in given else list(grid) for name in names]
    for values in itertools.product(*choices):
        yield dict(zip(names, values, strict=True))
