"""The preset `best`: an experiment of CM3, re-ranked by co-occurrence and by neighbours by content."""

from collections.abc import Mapping
from typing import Any

from cm3.baselines.ease import EASE
from cm3.common.errors import UserError
from cm3.datasets.spec import SourceSpec
from cm3.model_registry import DEFAULT_MODEL
from workflow.plan.experiments import inherit

BEST = "best"
_CONTENT = "itemknn-content"


def with_best(
    experiments: Mapping[str, Mapping[str, Any]], datasets: Mapping[str, SourceSpec]
) -> dict[str, dict[str, Any]]:
    """Return the entries of `experiments`, each with `preset: best` replaced by a re-ranking and what it combines.

    The entry `E: {like: X, preset: best}` becomes a re-ranking of X; with further keys, one of `E-cm3`, which has them. The
    experiments that help are `E-ease` (`E-itemknn` for more items than EASE takes) and `E-itemknn-content`. An entry of
    the user with one of these names is used as it is.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in experiments.items():
        if entry.get("preset") != BEST:
            found[name] = dict(entry)
            continue
        own = {key: value for key, value in entry.items() if key != "preset"}
        base = entry.get("like")
        derived = {}
        if set(own) != {"like"} or not isinstance(base, str) or base not in experiments:
            base = f"{name}-cm3"
            derived[base] = own
        try:
            whole = inherit(base, {**experiments, **derived})
        except UserError:
            whole = {}
        if not _is_cm3(whole):
            found[name] = dict(entry)  # parsing it reports what is wrong with `like`, the dataset or the preset
            continue
        helpers = [f"{name}-{model}" for model in (_co_occurrence(whole, datasets), _CONTENT)]
        found[name] = {"like": base, "model": {"name": "rerank", "of": base, "by": helpers}}
        derived |= {helper: {"like": base, "model": {"name": helper.removeprefix(f"{name}-")}} for helper in helpers}
        found |= {other: section for other, section in derived.items() if other not in experiments}
    return found


def _is_cm3(section: Mapping[str, Any]) -> bool:
    model = section.get("model", {})
    return "dataset" in section and isinstance(model, dict) and model.get("name", DEFAULT_MODEL) == DEFAULT_MODEL


def _co_occurrence(section: Mapping[str, Any], datasets: Mapping[str, SourceSpec]) -> str:
    """Return the model: from the expected number of items, so that the plan does not depend on what is on disk."""
    dataset = datasets.get(str(section.get("dataset")))
    items = dataset.expected_counts().get("items", 0) if dataset else 0
    return "itemknn" if items > EASE.model_fields["max_items"].default else "ease"
