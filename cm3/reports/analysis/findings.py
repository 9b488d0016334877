"""Findings of a comparison in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from cm3.reports.analysis.pairs import find_pair

_KINDS = {
    "gaussian": "Gaussian noise of equal norms",
    "shuffled": "the features of other items (rows shuffled)",
    "constant": "one constant vector",
}


def sentences(
    experiments: Mapping[str, Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], metric: str, tests: int
) -> list[dict[str, Any]]:
    """Return the findings: warnings, content against controls, models against simpler ones, noise of training.

    Args:
        experiments, pairs: as in comparison.json.
        metric: the metric that the sentences refer to.
        tests: size of the family of corrected tests.

    Returns:
        Dicts of kind (warning, control, baseline, seeds), experiment, against, metric, verdict (gain, none, loss)
        and text.
    """
    findings = _warnings(experiments) + _tuning(experiments)
    for name, experiment in experiments.items():
        own = experiment["control_of"]
        pair = find_pair(pairs, own, name, metric) if own is not None else None
        if pair is not None:
            findings.append(_control(own, name, experiment["control"] or {}, experiments[own], pair, metric, tests))
    findings += _baselines(experiments, pairs, metric, tests)
    findings += _seeds(pairs, metric)
    return findings


def _finding(
    kind: str, experiment: str, against: str | None, metric: str | None, verdict: str | None, text: str
) -> Any:
    return {
        "kind": kind,
        "experiment": experiment,
        "against": against,
        "metric": metric,
        "verdict": verdict,
        "text": text,
    }


def _warnings(experiments: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    findings = []
    for name, experiment in experiments.items():
        for warning in experiment["warnings"]:
            findings.append(_finding("warning", name, None, None, None, f"{name}: {warning}."))
        if experiment["n_seeds"] == 1:
            text = f"{name} has one seed only: the variation between trainings is unknown."
            findings.append(_finding("warning", name, None, None, None, text))
    return findings


def _tuning(experiments: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    findings = []
    for name, experiment in experiments.items():
        own = experiment["control_of"]
        tried = [len(experiments[n]["grid"]) for n in (own, name)] if own is not None else [1, 1]
        if tried[0] != tried[1]:
            text = (
                f"{own} is the best of {tried[0]} grid points and its control {name} of {tried[1]}: part of their "
                "difference may be tuning. Give both the same grid."
            )
            findings.append(_finding("warning", own, name, None, None, text))
    return findings


def _control(
    own: str,
    control: str,
    kinds: Mapping[str, str],
    experiment: Mapping[str, Any],
    pair: Mapping[str, Any],
    metric: str,
    tests: int,
) -> dict[str, Any]:
    replaced = _replaced(kinds, experiment["modalities"])
    verdict = {"a": "gain", "b": "loss", None: "none"}[pair["better"]]
    what = "its content" if set(kinds) == set(experiment["modalities"]) else f"its {_listed(list(kinds))} features"
    # An interval that excludes 0 without a significant test is inconclusive.
    unsure = pair["low"] > 0 or pair["high"] < 0
    claim = {
        "gain": f"{own} gains from {what}",
        "loss": f"{own} loses by {what}",
        "none": f"No gain of {own} from {what} is shown" if unsure else f"{own} gains nothing measurable from {what}",
    }[verdict]
    text = (
        f"{claim}: {metric} is {_number(pair['mean_a'])}, and {_number(pair['mean_b'])} with {replaced} "
        f"({control}); {_evidence(pair, tests)}."
    )
    found: dict[str, Any] = _finding("control", own, control, metric, verdict, text)
    return found


def _replaced(kinds: Mapping[str, str], modalities: Mapping[str, str]) -> str:
    # "Gaussian noise of equal norms in place of text and image": one clause for each kind of control.
    by_kind: dict[str, list[str]] = {}
    for modality, kind in kinds.items():
        by_kind.setdefault(kind, []).append(modality)
    clauses = []
    for kind, replaced in by_kind.items():
        everything = len(replaced) == len(modalities) > 1
        of = "all its features" if everything else f"its {_listed(replaced)} features"
        clauses.append(f"{_KINDS.get(kind, kind)} in place of {of}")
    return _listed(clauses)


def _baselines(
    experiments: Mapping[str, Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], metric: str, tests: int
) -> list[dict[str, Any]]:
    """Return models that do not beat MostPop, and models with content that do not beat one without."""
    findings = []
    for name, experiment in experiments.items():
        if experiment["control"] or experiment["model"] == "mostpop":
            continue
        for other, simple in experiments.items():
            popularity = simple["model"] == "mostpop"
            without_content = not simple["modalities"] and bool(experiment["modalities"])
            if other == name or not (popularity or without_content):
                continue
            pair = find_pair(pairs, name, other, metric)
            if pair is None or pair["better"] == "a":
                continue
            kind = "which recommends the most popular items" if popularity else "which uses no content"
            verdict = "loss" if pair["better"] == "b" else "none"
            claim = "is significantly worse than" if verdict == "loss" else "does not significantly beat"
            text = (
                f"{name} {claim} {other}, {kind}: {metric} is {_number(pair['mean_a'])} against "
                f"{_number(pair['mean_b'])}; {_evidence(pair, tests)}."
            )
            findings.append(_finding("baseline", name, other, metric, verdict, text))
    return findings


def _seeds(pairs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    findings = []
    for pair in pairs:
        if pair["metric"] != metric or not pair["significant"] or pair["seeds"]["exceeds"] is not False:
            continue
        better, worse = (pair["a"], pair["b"]) if pair["better"] == "a" else (pair["b"], pair["a"])
        pair = find_pair(pairs, better, worse, metric) or pair
        seeds = pair["seeds"]
        text = (
            f"{better} is better than {worse} over these users, but not beyond the noise of training: over seeds the "
            f"95 % interval of the difference in {metric} is {_number(seeds['low'])} to {_number(seeds['high'])}. "
            "More seeds may settle it."
        )
        findings.append(_finding("seeds", better, worse, metric, "none", text))
    return findings


def _evidence(pair: Mapping[str, Any], tests: int) -> str:
    p = "p < 0.001" if pair["p_holm"] < 0.001 else f"p = {pair['p_holm']:.3f}"
    family = f" after Holm's correction over {tests} tests" if tests > 1 else ""
    return (
        f"difference {_number(pair['difference'])}, 95 % interval {_number(pair['low'])} to {_number(pair['high'])}, "
        f"{p}{family}"
    )


def _number(value: float) -> str:
    return f"{value + 0.0:.4f}" if round(value, 4) else "0.0000"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
