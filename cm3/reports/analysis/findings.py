"""Findings of a comparison in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from cm3.reports.analysis.pairs import find_pair

_KINDS = {
    "gaussian": "Gaussian noise of equal norms",
    "shuffled": "the features of other items (rows shuffled)",
    "constant": "one constant vector",
}


def main_experiment(experiments: Mapping[str, Mapping[str, Any]], reference: str | None) -> str:
    """Return the experiment that a study is about: its reference, or its first one with content, or its first one."""
    with_content = (name for name, one in experiments.items() if one["modalities"] and not one["control"])
    return reference or next(with_content, next(iter(experiments)))


def reranked_experiment(experiment: Mapping[str, Any]) -> str | None:
    """Return the experiment whose lists a re-ranking orders anew; None for other models."""
    found: str | None = experiment["settings"].get("model.of")
    return found


def uses_content(experiment: Mapping[str, Any]) -> bool:
    """Return whether an experiment reads features, or re-ranks lists of models that may."""
    return bool(experiment["modalities"]) or reranked_experiment(experiment) is not None


def sentences(
    experiments: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    metric: str,
    tests: int,
    reference: str | None = None,
) -> list[dict[str, Any]]:
    """Return the findings: warnings, other models, content against controls, ablations, simple models, noise of training.

    Args:
        experiments, pairs: as in comparison.json.
        metric: the metric that the sentences refer to.
        tests: size of the family of corrected tests.
        reference: the experiment that all others are tested against, if there is one.

    Returns:
        Dicts of kind (warning, ahead, control, ablation, baseline, seeds, splits), experiment, against, metric, verdict
        (gain, none, loss) and text.
    """
    main = main_experiment(experiments, reference)
    findings = _warnings(experiments) + _tuning(experiments)
    findings += _ahead(main, experiments, pairs, metric, tests)
    for name, experiment in experiments.items():
        own = experiment["control_of"]
        pair = find_pair(pairs, own, name, metric) if own is not None else None
        if pair is not None:
            findings.append(_control(own, name, experiment["control"] or {}, experiments[own], pair, metric, tests))
    findings += _ablations(main, experiments, pairs, metric)
    findings += _baselines(main, experiments, pairs, metric, tests)
    findings += _within_noise("seeds", pairs, metric) + _within_noise("splits", pairs, metric)
    return findings


def _finding(
    kind: str, experiment: str | None, against: str | None, metric: str | None, verdict: str | None, text: str
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
    by_text: dict[str, list[str]] = {}
    for name, experiment in experiments.items():
        for warning in experiment["warnings"]:
            by_text.setdefault(warning, []).append(name)
    findings = [
        _finding("warning", names[0] if len(names) == 1 else None, None, None, None, f"{', '.join(names)}: {text}.")
        for text, names in by_text.items()
    ]
    # Over several splits, the runs of one seed differ in their training as well.
    alone = [name for name, one in experiments.items() if one["n_seeds"] == one.get("n_splits", 1) == 1]
    single = [name for name in alone if not experiments[name]["deterministic"]]
    if single:
        has = "has" if len(single) == 1 else "have"
        text = f"{_listed(single)} {has} one seed only: the variation between trainings is unknown."
        findings.append(_finding("warning", single[0] if len(single) == 1 else None, None, None, None, text))
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


def _ahead(
    main: str,
    experiments: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    metric: str,
    tests: int,
) -> list[dict[str, Any]]:
    """Return one sentence on all other models that the main experiment is significantly better than."""
    found = [
        pair
        for name in _other_models(main, experiments)
        if (pair := find_pair(pairs, main, name, metric)) and pair["better"] == "a"
    ]
    if not found:
        return []
    closest = min(found, key=lambda pair: abs(pair["difference"]))
    beaten = [str(pair["b"]) for pair in found]
    before = f"{main} is ahead of {_listed(beaten)}; of {closest['b']}, the closest," if len(beaten) > 1 else ""
    text = (
        f"{before or f'{main} is ahead of {beaten[0]}'} by {_number(abs(closest['difference']))} {metric}"
        f"{_in_brackets(_relative(closest))}: {_number(closest['mean_a'])} against {_number(closest['mean_b'])}; "
        f"{_certainty(closest, tests)}."
    )
    return [_finding("ahead", main, str(closest["b"]), metric, "gain", text)]


def _other_models(main: str, experiments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    model = experiments[main]["model"]
    return [name for name, one in experiments.items() if one["model"] != model and not one["control"]]


def _ablations(
    main: str, experiments: Mapping[str, Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], metric: str
) -> list[dict[str, Any]]:
    """Return one sentence on all experiments with the main one's model and other settings or modalities."""
    whole = experiments[main]
    parts = []
    for name, one in experiments.items():
        pair = find_pair(pairs, name, main, metric)
        if name == main or one["model"] != whole["model"] or one["control"] or pair is None:
            continue
        change = _relative(pair) or f"by {_number(pair['difference'])}"
        changed = changes(whole, one)
        label = f"{', '.join(changed)} ({name})" if changed else name
        parts.append(f"{label} {change}{'' if pair['significant'] else ', not significant'}")
    if not parts:
        return []
    text = f"Changes in {metric} against {main}: {'; '.join(parts)}."
    return [_finding("ablation", main, None, metric, None, text)]


def changes(whole: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in words the modalities and settings in which an experiment differs from another one of the same model."""
    words = []
    dropped = [name for name in whole["modalities"] if name not in other["modalities"]]
    if dropped:
        words.append(f"without {_listed(dropped)}")
    for name, extractor in other["modalities"].items():
        if whole["modalities"].get(name) != extractor:
            words.append(f"{name} by {extractor}")
    searched = {*whole["point"], *other["point"]}
    before, after = whole["settings"], other["settings"]
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key) and key not in searched:
            words.append(f"{key.partition('.')[2] or key} = {_value(after.get(key))}")
    return words


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else "unset" if value is None else str(value)


def _baselines(
    main: str,
    experiments: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    metric: str,
    tests: int,
) -> list[dict[str, Any]]:
    """Return models that do not beat MostPop, models with content that do not beat one without, and models that the main
    experiment does not beat."""
    findings = []
    rivals = _other_models(main, experiments)
    for name, experiment in experiments.items():
        if experiment["control"] or experiment["model"] == "mostpop":
            continue
        for other, simple in experiments.items():
            popularity = simple["model"] == "mostpop"
            without_content = not uses_content(simple) and uses_content(experiment)
            if other == name or not (popularity or without_content or (name == main and other in rivals)):
                continue
            pair = find_pair(pairs, name, other, metric)
            if pair is None or pair["better"] == "a":
                continue
            kind = ", which uses no content" if without_content else ""
            if of := reranked_experiment(simple):
                kind = f", which re-ranks the lists of {of}"
            if popularity:
                kind = ", which recommends the most popular items"
            verdict = "loss" if pair["better"] == "b" else "none"
            claim = "is significantly worse than" if verdict == "loss" else "does not significantly beat"
            text = (
                f"{name} {claim} {other}{kind}: {metric} is {_number(pair['mean_a'])} against "
                f"{_number(pair['mean_b'])}; {_evidence(pair, tests)}."
            )
            findings.append(_finding("baseline", name, other, metric, verdict, text))
    return findings


def _within_noise(kind: str, pairs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return the significant differences that do not exceed the variation between seeds, or between splits."""
    noise = {"seeds": "the noise of training", "splits": "the variation between random splits"}[kind]
    findings = []
    for pair in pairs:
        if pair["metric"] != metric or not pair["significant"] or pair.get(kind, {}).get("exceeds") is not False:
            continue
        better, worse = (pair["a"], pair["b"]) if pair["better"] == "a" else (pair["b"], pair["a"])
        pair = find_pair(pairs, better, worse, metric) or pair
        low, high = pair[kind]["low"], pair[kind]["high"]
        text = (
            f"{better} is better than {worse} over these users, but not beyond {noise}: over {kind} the "
            f"95 % interval of the difference in {metric} is {_number(low)} to {_number(high)}. "
            f"More {kind} may settle it."
        )
        findings.append(_finding(kind, better, worse, metric, "none", text))
    return findings


def _evidence(pair: Mapping[str, Any], tests: int) -> str:
    return f"difference {_number(pair['difference'])}, {_certainty(pair, tests)}"


def _certainty(pair: Mapping[str, Any], tests: int) -> str:
    p = "p < 0.001" if pair["p_holm"] < 0.001 else f"p = {pair['p_holm']:.3f}"
    family = f" after Holm's correction over {tests} tests" if tests > 1 else ""
    return f"95 % interval {_number(pair['low'])} to {_number(pair['high'])}, {p}{family}"


def _relative(pair: Mapping[str, Any]) -> str:
    """Return the difference in percent of the second mean, such as "+31 %"; empty if that mean is 0."""
    if not pair["mean_b"]:
        return ""
    share = 100 * pair["difference"] / pair["mean_b"]
    return f"{share + 0.0:+.{1 if abs(share) < 9.95 else 0}f} %"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _number(value: float) -> str:
    return f"{value + 0.0:.4f}" if round(value, 4) else "0.0000"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
