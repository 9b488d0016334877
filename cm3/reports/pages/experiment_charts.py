"""The charts of an experiment: training curves, the alignment-uniformity plane, stream weights, activity."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.errors import DamagedFileError
from cm3.common.files import file_error, sha256_of
from cm3.common.tensors import read_tensors
from cm3.reports.pages.chart import Bars, Chart, Line, Mark, Points
from cm3.reports.pages.page import pretty

_NAMES = {
    "loss": "Training loss",
    "alignment": "Alignment loss",
    "user_uniformity": "Uniformity loss of users",
    "item_uniformity": "Uniformity loss of items",
    "fused_cosine": "Mean cosine of fused points",
}
_BINS = 40


def read_history(path: Path | None, sha256: str | None = None) -> dict[str, list[float | None]]:
    """Return the columns of history.csv, with None for empty values; an empty dict if there is no file.

    Raises:
        DamagedFileError: the file has another checksum than `sha256`.
    """
    if path is None:
        return {}
    try:
        if sha256 not in (None, sha256_of(path)):
            raise DamagedFileError(path, "it is not the history that its training wrote")
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise file_error(path, error) from None
    if not rows:
        return {}
    return {name: [_number(row[name]) for row in rows] for name in rows[0]}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # a text column
        return None


def training_curves(history: Mapping[str, list[float | None]], best_epoch: int | None) -> list[Chart]:
    """Return a chart for every numeric column, metrics on held-out splits first."""
    epochs = [epoch for epoch in history.get("epoch", []) if epoch is not None]
    names = [name for name in history if name != "epoch" and any(value is not None for value in history[name])]
    names.sort(key=lambda name: "@" not in name)
    marks = (Mark(best_epoch, f"best, epoch {best_epoch}"),) if best_epoch and len(epochs) > 1 else ()
    return [
        Chart(
            name="training-" + "".join(letter if letter.isalnum() else "-" for letter in name),
            title=_title(name),
            x_label="epoch",
            y_label=_unit(name),
            series=(Line(epochs, history[name], tone="accent" if "@" in name else "ink"),),
            marks=marks,
            wide=320,
            high=200,
        )
        for name in names
    ]


def _title(column: str) -> str:
    for split, word in (("valid_", "Validation"), ("test_", "Test")):
        if column.startswith(split):
            return f"{word} {pretty(column.removeprefix(split))}"
    return _NAMES.get(column, column.replace("_", " ").capitalize())


def _unit(column: str) -> str:
    if "@" in column:
        return pretty(column.partition("_")[2])
    units = {"cosine": "cosine", "norm": "norm", "weight": "mean weight", "seconds": "seconds", "lr": "learning rate"}
    return next((unit for part, unit in units.items() if part in column), "loss")


def plane(
    history: Mapping[str, list[float | None]], best_epoch: int | None, geometry: Mapping[str, float] | None
) -> Chart | None:
    """Return the alignment-uniformity plane: paths of the losses up to the best epoch, and the final embeddings.

    The paths are means over training batches, with a possibly calibrated item term; the final points are the plain
    alignment and uniformity of the exported embeddings.
    """
    series: list[Line | Points] = []
    align = history.get("alignment")
    for column, name, tone in (("user_uniformity", "users", "ink"), ("item_uniformity", "items", "muted")):
        path = history.get(column)
        if align and path:
            both = zip(path[:best_epoch], align[:best_epoch], strict=True)
            known = [(x, y) for x, y in both if x is not None and y is not None]
            x, y = [one for one, _ in known], [two for _, two in known]
            series.append(Line(x, y, f"{name}, epoch 1", tone=tone, dashed=name == "items"))  # type: ignore[arg-type]
            every = max(1, len(x) // 8)
            hints = [f"{name}, epoch {number + 1}" for number in range(0, len(x), every)]
            series.append(Points(x[::every], y[::every], hints=hints, tone=tone, hollow=True))  # type: ignore[arg-type]
    if geometry:
        a = geometry["alignment"]
        places = [geometry["uniformity_users"], geometry["uniformity_items"]]
        hints = [
            f"{name}: alignment {a:.3f}, uniformity {u:.3f}" for name, u in zip(("users", "items"), places, strict=True)
        ]
        series.append(Points(places, [a, a], ["users, final", "items, final"], hints, "accent"))
    if not series:
        return None
    return Chart(
        "alignment-uniformity",
        "Alignment and uniformity",
        "uniformity (left is more even)",
        "alignment (lower is closer)",
        tuple(series),
        wide=460,
        high=330,
    )


def read_streams(model: Path | None) -> np.ndarray | None:
    """Return the (U, M + 1) stream weights of the users, None for models without, such as those that have lists alone."""
    if model is None or model.suffix != ".safetensors":
        return None
    tensors, _ = read_tensors(model)
    if "stream_logits" not in tensors:
        return None
    logits = tensors["stream_logits"].numpy().astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def stream_names(modalities: list[str], count: int) -> list[str]:
    """Return a name for each of `count` streams: the modalities, then the fused one."""
    names = [*modalities, "fused"]
    return names if len(names) == count else [f"stream {number}" for number in range(1, count + 1)]


def stream_chart(names: list[str], weights: np.ndarray) -> Chart:
    """Return the distribution of the users' weights of each stream, in percent of users by weight."""
    low, high = float(weights.min()), float(weights.max())
    edges = np.linspace(low, max(high, low + 1e-9), _BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    tones = ("ink", "muted")
    series = []
    for number, name in enumerate(names):
        shares = (100 * np.histogram(weights[:, number], edges)[0] / len(weights)).tolist()
        tone = "accent" if name == "fused" else tones[number % 2]
        dashed = tone != "accent" and number >= len(tones)
        series.append(Line(middles, shares, tone=tone, dashed=dashed))  # type: ignore[arg-type]
        top = int(np.argmax(shares))
        series.append(Points([middles[top]], [shares[top]], [name], tone=tone))  # type: ignore[arg-type,arg-type]
    return Chart(
        "stream-weights",
        "Stream weights of users",
        "weight (softmax over streams)",
        "% of users",
        tuple(series),
        zero=True,
        wide=460,
        high=260,
    )


def stream_rows(names: list[str], weights: np.ndarray) -> list[dict[str, Any]]:
    """Return for each stream the mean weight and the 5 % and 95 % quantiles over users."""
    low, high = np.quantile(weights, [0.05, 0.95], axis=0)
    return [
        {"name": name, "mean": float(weights[:, n].mean()), "low": float(low[n]), "high": float(high[n])}
        for n, name in enumerate(names)
    ]


def activity_charts(stats: Mapping[str, Any]) -> list[Chart]:
    """Return histograms of interactions per user and per item, from the data statistics."""
    found = []
    for who in ("user", "item"):
        histogram = dict(stats.get(f"interactions_per_{who}", {}).get("histogram", {}))
        while histogram and next(iter(histogram.values())) == 0:
            histogram.pop(next(iter(histogram)))
        if histogram:
            bars = Bars(list(histogram), list(histogram.values()))
            found.append(
                Chart(
                    f"interactions-per-{who}",
                    f"Interactions per {who}",
                    "interactions",
                    f"{who}s",
                    (bars,),
                    wide=320,
                    high=190,
                )
            )
    return found
