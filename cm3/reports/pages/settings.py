"""The overview, settings and metric tables of an experiment's page."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cm3.reports.pages.page import duration, metric_name

HEADLINE = ("recall", "ndcg", "hitrate", "mrr")
NEARLY_EQUAL = 0.99
"""Mean cosine of two items' fused points from which on the page warns that they hardly differ."""


def overview(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the overview: model, data, features, seed, run."""
    config, training = metrics["config"], metrics["training"]
    model = str(config["model"].get("name", "cm3"))
    rows = [("Model", {"cm3": "CM3"}.get(model, model)), ("Dataset", metrics["dataset"])]
    for modality in config["modalities"]:
        extractor = config["extractors"][modality]
        rows.append((modality.capitalize(), _extractor(extractor) + _reduced(metrics.get("reduced", {}).get(modality))))
    if not config["modalities"]:
        rows.append(("Features", features_of(config)))
    control = config.get("control") or config.get("controls")
    if control:
        rows.append(
            (
                "Control",
                ", ".join(f"{m}: {k}" for m, k in control.items()) if isinstance(control, Mapping) else str(control),
            )
        )
    split = config.get("split", {})
    rows.append(("Split", ", ".join(f"{name} {value}" for name, value in split.items() if value is not None)))
    if training.get("epochs"):
        rows.append(("Training", f"{training['epochs']} epochs, best {training['best_epoch']}; {training['stopped']}"))
    if training.get("parameters") is not None:
        rows.append(("Parameters", f"{training['parameters']:,}"))
    rows.append(("Seed", str(training.get("seed", ""))))
    rows.append(("Run", metrics["keys"]["run"]))
    return rows


def features_of(config: Mapping[str, Any]) -> str:
    """Return the modalities of an experiment, or what its model reads in place of them."""
    model = config["model"]
    if "of" in model and "by" in model:
        return f"the lists of {model['of']}, re-ranked by scores of {', '.join(model['by'])}"
    return ", ".join(config["modalities"]) or "interactions only"


def origin(metrics: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return when, how long, on which machine and with which commit the numbers were computed, where it is recorded.

    Args:
        metrics: metrics.json.
        records: the records of the stages `train` and `evaluate`; those of earlier releases hold no machine and commit.
    """
    rows = []
    train, evaluated = records.get("train", {}), records.get("evaluate", {})
    if "started" in train:
        when = datetime.fromtimestamp(train["started"], UTC)
        rows.append(("Trained", f"{when:%d %B %Y, %H:%M} UTC".lstrip("0")))
    seconds = {name: stage.get("wall_seconds") or 0.0 for name, stage in metrics["stages"].items()}
    if "train" in seconds:
        rows.append(
            ("Duration", f"training {duration(seconds['train'])}, all stages {duration(sum(seconds.values()))}")
        )
    device = train.get("device_name") or train.get("device")
    if train.get("machine"):
        rows.append(("Machine", f"{train['machine']}, on {device}"))
    elif device:
        rows.append(("Device", device))
    commits = list(dict.fromkeys(filter(None, (train.get("commit"), evaluated.get("commit")))))
    if commits:
        rows.append(("Commit", commits[0] if len(commits) == 1 else f"{commits[0]}, evaluated with {commits[1]}"))
    return rows


def warnings_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the warnings of metrics.json, and one of fused points that hardly differ."""
    found = [f"{metrics['warning']}."] if metrics.get("warning") else []
    cosine = (metrics["training"].get("best_loss") or {}).get("fused_cosine")
    if cosine is not None and cosine >= NEARLY_EQUAL:
        found.append(
            f"The fused points of two items have a mean cosine of {cosine:.4f}: the fusion hardly distinguishes items, and "
            "calibrated uniformity is almost plain uniformity. model.detach_similarity: true prevents this, but gave lower "
            "metrics on the fashion shop (benchmarks/RESULTS.md)."
        )
    return found


def _extractor(settings: Mapping[str, Any]) -> str:
    caption = settings.get("caption")
    if isinstance(caption, Mapping):
        return f"{settings['name']}: {_weights(caption)}, encoded by {_weights(settings['encoder'])}"
    return f"{settings['name']}: {_weights(settings)}"


def _reduced(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    kept = f"{100 * facts['explained_variance']:.1f} % of the variance"
    return f"; {facts['from']} numbers reduced to {facts['dim']} ({kept})"


def _weights(settings: Mapping[str, Any]) -> str:
    model = settings.get("model")
    return (
        f"{settings.get('backend', '')} {model}".strip() if isinstance(model, str) else str(settings.get("backend", ""))
    )


def sections(config: Mapping[str, Any], changed: Sequence[str] = ()) -> list[tuple[str, list[tuple[str, Any, bool]]]]:
    """Return the settings as (section, (dotted key, value, whether it is changed)), single values under `general`.

    `changed` names settings as SECTION.KEY; all values below such a key count as changed.
    """
    general: list[tuple[str, Any]] = []
    found: list[tuple[str, list[tuple[str, Any]]]] = []
    for name, value in config.items():
        if name == "extractors":
            found += [(f"extractor of {m}", _flat(settings)) for m, settings in value.items()]
        elif isinstance(value, Mapping):
            found.append((name, _flat(value)))
        else:
            general.append((name, value))
    marked = set(changed)
    return [
        (name, [(key, value, f"{name}.{key.partition('.')[0]}" in marked) for key, value in pairs])
        for name, pairs in [("general", general), *found]
        if pairs
    ]


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{before}{name}.")
        else:
            pairs.append((f"{before}{name}", value))
    return pairs


def metric_tables(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics as tables.

    `ks` and `rows` hold test and validation by metric and cut-off; `ways` the test metrics of each score and mask, and
    `kinds` those of cold and warm items, both at the one cut-off `shown`, which training monitored if it was measured.
    """
    test, valid = metrics["test"], metrics.get("valid") or {}
    names = list(dict.fromkeys(name.split("@")[0] for name in test))
    ks = sorted({int(name.split("@")[1]) for name in test})
    monitored = str(metrics["training"].get("monitor", "")).partition("@")[2]
    shown = int(monitored) if monitored.isdigit() and int(monitored) in ks else ks[-1]
    rows = [
        {
            "name": metric_name(name),
            "test": [test.get(f"{name}@{k}") for k in ks],
            "valid": [valid.get(f"{name}@{k}") for k in ks],
        }
        for name in names
    ]
    main = f"score {metrics['score']}, mask {metrics['mask']}"
    ways = [
        {"name": _way(way), "main": way == main, "values": [values.get(f"{name}@{shown}") for name in names]}
        for way, values in metrics["detail"]["test"].items()
    ]
    kinds = [
        {
            "name": {"cold": "cold items (without training interactions)", "warm": "all others"}.get(kind, kind),
            "users": part["users"],
            "interactions": part["interactions"],
            "values": [part.get(f"{name}@{shown}") for name in names],
        }
        for kind, part in metrics["detail"].get("items", {}).items()
    ]
    return {
        "names": [metric_name(name) for name in names],
        "ks": ks,
        "rows": rows,
        "ways": ways,
        "kinds": kinds,
        "shown": shown,
        "headline": [
            (f"{name}@{shown}", f"{metric_name(name)}@{shown}", test[f"{name}@{shown}"], valid.get(f"{name}@{shown}"))
            for name in HEADLINE
            if name in names
        ],
    }


def _way(name: str) -> str:
    score, _, mask = name.removeprefix("score ").partition(", mask ")
    score = {"dot": "dot product", "cosine": "cosine"}.get(score, score)
    return f"{score}, excluding items of {mask.replace('+', ' and ').replace('valid', 'validation').replace('train', 'training')}"
