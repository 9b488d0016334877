"""The preset `best`: CM3 with the words of the texts as a modality, re-ranked by co-occurrence and content."""

from collections.abc import Mapping
from typing import Any

from cm3.baselines.cease import CEASE
from cm3.common.errors import UserError
from cm3.datasets.spec import SourceSpec
from cm3.model_registry import DEFAULT_MODEL
from extractors.spec import BackendSpec
from workflow.plan.experiments import inherit

BEST = "best"
WORDS = "words"
"""Modality that the preset adds."""
_WORDS_BACKEND = "tfidf"
_CONTENT = "itemknn-content"


def with_best(
    experiments: Mapping[str, Mapping[str, Any]],
    datasets: Mapping[str, SourceSpec],
    extractors: Mapping[str, BackendSpec],
) -> dict[str, dict[str, Any]]:
    """Return the entries of `experiments`, each with `preset: best` replaced by a re-ranking and what it combines.

    The entry `E: {like: X, preset: best}` becomes a re-ranking of `E-cm3`: X with the modality `words` and with further keys of
    E. Without either it is a re-ranking of X itself: words are added where X reads texts by an extractor of modality text, no
    words yet, and sets no `modality_weights`, and the configuration has an extractor of the backend tfidf. The
    experiments that help are `E-cease` (`E-itemknn` for more items than CEASE takes) and `E-itemknn-content`. An entry of the
    user with one of these names is used as it is.
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
        if words := _words(whole, extractors):
            kept = derived.get(f"{name}-cm3", {"like": base})
            base = f"{name}-cm3"
            derived[base] = kept | {"modalities": {**whole["modalities"], WORDS: words}}
        co_occurrence = "cease" if f"{name}-cease" in experiments else _co_occurrence(whole, datasets)
        helpers = [f"{name}-{model}" for model in (co_occurrence, _CONTENT)]
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
    return "itemknn" if items > CEASE.model_fields["max_items"].default else "cease"


def _words(section: Mapping[str, Any], extractors: Mapping[str, BackendSpec]) -> str | None:
    """Return the extractor of words that an experiment lacks, None if it has one or cannot have one."""
    modalities, model = section.get("modalities"), section.get("model", {})
    if not isinstance(modalities, Mapping) or WORDS in modalities or model.get("modality_weights") is not None:
        return None
    specs = [extractors.get(str(extractor)) for extractor in modalities.values()]
    if any(spec is None or spec.backend == _WORDS_BACKEND for spec in specs):
        return None
    offered = [name for name, spec in extractors.items() if spec.backend == _WORDS_BACKEND and spec.modality == WORDS]
    reads_texts = any(spec.modality == "text" for spec in specs if spec)
    return offered[0] if offered and reads_texts else None
