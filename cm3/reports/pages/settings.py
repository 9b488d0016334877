"""The overview, settings and metric tables of an experiment's page."""

from collections.abc import Mapping
from typing import Any

from cm3.reports.pages.page import metric_name

HEADLINE = ("recall", "ndcg", "hitrate", "mrr")


def overview(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the overview: model, data, features, seed, run."""
    config, training = metrics["config"], metrics["training"]
    model = str(config["model"].get("name", "cm3"))
    rows = [("Model", {"cm3": "CM3"}.get(model, model)), ("Dataset", metrics["dataset"])]
    for modality in config["modalities"]:
        extractor = config["extractors"][modality]
        rows.append((modality.capitalize(), _extractor(extractor)))
    if not config["modalities"]:
        rows.append(("Features", "none: interactions only"))
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


def _extractor(settings: Mapping[str, Any]) -> str:
    caption = settings.get("caption")
    if isinstance(caption, Mapping):
        return f"{settings['name']}: {_weights(caption)}, encoded by {_weights(settings['encoder'])}"
    return f"{settings['name']}: {_weights(settings)}"


def _weights(settings: Mapping[str, Any]) -> str:
    model = settings.get("model")
    return (
        f"{settings.get('backend', '')} {model}".strip() if isinstance(model, str) else str(settings.get("backend", ""))
    )


def sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the settings as (section, (dotted key, value) pairs), single values under `general`."""
    general: list[tuple[str, Any]] = []
    found: list[tuple[str, list[tuple[str, Any]]]] = []
    for name, value in config.items():
        if name == "extractors":
            found += [(f"extractor of {m}", _flat(settings)) for m, settings in value.items()]
        elif isinstance(value, Mapping):
            found.append((name, _flat(value)))
        else:
            general.append((name, value))
    return [("general", general), *((name, pairs) for name, pairs in found if pairs)]


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
            (f"{metric_name(name)}@{shown}", test[f"{name}@{shown}"], valid.get(f"{name}@{shown}"))
            for name in HEADLINE
            if name in names
        ],
    }


def _way(name: str) -> str:
    score, _, mask = name.removeprefix("score ").partition(", mask ")
    score = {"dot": "dot product", "cosine": "cosine"}.get(score, score)
    return f"{score}, excluding items of {mask.replace('+', ' and ').replace('valid', 'validation').replace('train', 'training')}"
