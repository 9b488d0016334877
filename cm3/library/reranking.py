"""Re-ranking in the library: further models whose scores order the first items of a model's lists anew."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scipy.sparse as sp

from cm3.common.errors import UserError
from cm3.common.files import read_json, write_json
from cm3.common.strict import validate
from cm3.evaluation.rerank import fit_weights
from cm3.evaluation.rerank_config import Rerank
from cm3.library.scoring import scores
from cm3.model_registry import parse_model
from cm3.model_spec import ModelSpec

if TYPE_CHECKING:
    from cm3.library.recommender import Recommender

_WEIGHTS = "weights.json"


@dataclass(frozen=True)
class Reranking:
    """Models that order the first items of another model's lists (`cm3.evaluation.rerank` has the formula).

    Attributes:
        parts: the models by name, with the users and items of the base model.
        weights: of their standardised scores, by name.
        top: how many of the base model's items are ordered anew.
        tried: the weights that were tried, with their values on the held-out interactions.
    """

    parts: "Mapping[str, Recommender]"
    weights: Mapping[str, float]
    top: int
    tried: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        """Write the weights, and each model to a folder of its own."""
        remove_reranking(folder)
        for name, part in self.parts.items():
            part.save(folder / name)
        facts = {"parts": list(self.parts), "weights": dict(self.weights), "top": self.top, "tried": self.tried}
        write_json(folder / _WEIGHTS, facts)


def read_reranking(folder: Path, load: "Callable[[Path], Recommender]") -> Reranking | None:
    """Return what `Reranking.save` wrote to a folder; None if there is none."""
    if not (folder / _WEIGHTS).exists():
        return None
    facts = read_json(folder / _WEIGHTS)
    return Reranking(
        {name: load(folder / name) for name in facts["parts"]}, facts["weights"], facts["top"], facts["tried"]
    )


def remove_reranking(folder: Path) -> None:
    """Remove what `Reranking.save` wrote to a folder."""
    if (folder / _WEIGHTS).exists():
        shutil.rmtree(folder)


def parse_reranking(given: Mapping[str, Any], base: str, monitor: str) -> tuple[Rerank, dict[str, ModelSpec]]:
    """Return the settings of a re-ranking and of its models by name.

    Args:
        given: `by`, a list of names of models or a mapping from names to their settings, with top, weights and grid of
            `cm3.evaluation.rerank_config.Rerank`.
        base: name of the model whose lists are ordered anew.
        monitor: metric at a cut-off.

    Raises:
        UserError: an unknown model or key, an impossible value, a model that has no scores, or a cut-off beyond `top`.
    """
    if "of" in given:
        raise UserError("fit.rerank.of: remove it; the lists of the model itself are ordered anew")
    by = given.get("by", [])
    own = by if isinstance(by, Mapping) else {}
    names = list(by) if isinstance(by, Mapping) else by
    settings = validate(Rerank, {**given, "of": base, "by": names}, "fit.rerank")
    k = int(monitor.partition("@")[2])
    if k > settings.top:
        raise UserError(
            f"fit.rerank.top = {settings.top}: the monitored metric is {monitor}; re-rank at least {k} items"
        )
    specs = {}
    for name in settings.by:
        chosen = own.get(name, {})
        if not isinstance(chosen, Mapping):
            raise UserError(
                f"fit.rerank.by.{name} = {chosen!r}: write its settings as a mapping, {{}} for the defaults"
            )
        specs[name] = parse_model({**chosen, "name": name}, f"fit.rerank.by.{name}")
        if specs[name].exports == "lists":
            raise UserError(
                f"fit.rerank.by.{name}: has lists and no scores; name a model with embeddings or item weights"
            )
    return settings, specs


def fit_reranking(
    base: "Recommender",
    parts: "Mapping[str, Recommender]",
    settings: Rerank,
    observed: sp.csr_matrix,
    held_out: sp.csr_matrix,
    monitor: str,
) -> Reranking:
    """Choose the weights on held-out interactions.

    Args:
        base, parts: models of the same users and items, trained on `observed`.
        settings: top, weights and grid.
        observed, held_out: (U, I) interactions.
        monitor: metric at a cut-off.
    """

    def of(model: "Recommender") -> Any:
        return scores(model, model.users, observed)

    weights, tried, _ = fit_weights(
        of(base),
        {name: of(part) for name, part in parts.items()},
        observed,
        held_out,
        top=settings.top,
        monitor=monitor,
        grid=settings.grid,
        given=settings.weights,
    )
    return Reranking(parts, weights, settings.top, tried)
