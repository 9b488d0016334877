"""Stage `study_page`: the page of a study's comparison, and its figures."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3.common.cli import stage
from cm3.common.files import read_json
from cm3.reports.analysis.findings import changes, reranked_experiment
from cm3.reports.analysis.slices import column_of
from cm3.reports.analysis.user_gap import chance_name, gap_name
from cm3.reports.analysis.user_groups import FEWEST_USERS
from cm3.reports.pages.chart import Chart, Forest, Points
from cm3.reports.pages.figures import save_figures
from cm3.reports.pages.page import pretty, setting, write_page
from cm3.reports.pages.search import search_sections
from cm3.reports.pages.text_tables import latex, markdown

log = logging.getLogger("cm3.reports.pages.study_page")

COLUMNS = 8
"""Metrics in the table of results: as many as fit next to each other on a page 1024 pixels wide."""


def study_page(*, comparison: Path, page_output: Path, figures_output: Path) -> dict[str, Any]:
    """Write the page of a comparison.json (see `cm3.reports.analysis.compare`) and its figures as SVG and PNG.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: the comparison is missing or invalid.
    """
    study = read_json(comparison)
    metrics = _ordered(study["metrics"])
    columns = metrics if len(metrics) <= COLUMNS else _chosen(metrics, study["headline"])
    both, cost = planes(study), _cost_chart(study)
    searches = search_sections(study)
    charts = [*both, *([cost] if cost else []), *(one["chart"] for one in searches)]
    context = {
        "study": study,
        "splits": study["settings"].get("splits", []),
        "names": {metric: pretty(metric) for metric in metrics},
        "metrics": metrics,
        "columns": columns,
        "labels": {name: _labels(study, name) for name in study["experiments"]},
        "copies": {"Markdown": markdown(study, columns), "LaTeX": latex(study, columns)},
        "verdicts": _verdicts(study, columns),
        "pages_command": _pages_command(study),
        "runs": _runs(study),
        "intervals": {metric: _intervals(study, metric) for metric in metrics},
        "differences": [table for metric in metrics if (table := _differences(study, metric))["rows"]],
        "slices": _slices(study, metrics),
        "fewest_users": FEWEST_USERS,
        "beyond": _beyond(study),
        "planes": both,
        "cost": cost,
        "searches": searches,
        "grids": {name: one["grid"] for name, one in study["experiments"].items() if len(one["grid"]) > 1},
    }
    write_page(page_output, "study.html", context)
    forests = [_forest(study, metric) for metric in study["metrics"]]
    figures = save_figures([*forests, *charts], figures_output)
    log.info("%s: %d experiments, %d figures", page_output, len(study["experiments"]), len(figures))
    return {"bytes": page_output.stat().st_size, "figures": len(figures)}


def _ordered(metrics: Sequence[str]) -> list[str]:
    """Return the metrics by name, in their order, and each by ascending cut-off."""
    names = list(dict.fromkeys(metric.partition("@")[0] for metric in metrics))
    return sorted(
        metrics, key=lambda metric: (names.index(metric.partition("@")[0]), int(metric.partition("@")[2] or 0))
    )


def _chosen(metrics: Sequence[str], headline: str) -> list[str]:
    """Return the metrics of the first table where all would not fit: all at the headline's cut-off, then its own others."""
    name, _, cutoff = headline.partition("@")
    first = [metric for metric in metrics if metric.partition("@")[2] == cutoff]
    own = [metric for metric in metrics if metric.partition("@")[0] == name]
    chosen = list(dict.fromkeys([headline, *first, *own]))[:COLUMNS]
    return [metric for metric in metrics if metric in chosen]


def _labels(study: Mapping[str, Any], name: str) -> list[str]:
    """Return what distinguishes an experiment, for the line below its name."""
    one, main = study["experiments"][name], study["experiments"][study["main"]]
    found = []
    if name == study["reference"]:
        found.append("reference")
    if one["control_of"]:
        found.append(f"control of {one['control_of']}")
    elif name != study["main"] and one["model"] == main["model"]:
        found += changes(main, one)
    else:
        of = reranked_experiment(one)
        features = f"lists of {of}" if of else ", ".join(one["modalities"]) or "no content"
        found.append(f"{'CM3' if one['model'] == 'cm3' else one['model']}: {features}")
    if one["control"] and not one["control_of"]:
        found.append(f"control: {', '.join(sorted(set(one['control'].values())))}")
    return found + [f"{key} = {setting(value)}" for key, value in one["point"].items()]


def _verdicts(study: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return why the best of a column is marked or not, and the columns for which that is so."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        best = study["best"][metric]
        text = best["reason"] if best["marked"] else f"not marked, because {best['reason']}"
        found.setdefault(text, []).append(pretty(metric))
    return found


def _pages_command(study: Mapping[str, Any]) -> str:
    before = study["command"].rpartition(" ")[0]
    return " ".join([before, *(f"results/{name}/report.html" for name in study["experiments"])])


def _runs(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the different runs, each with its seeds: a closed form has one for all of them."""
    found: dict[str, dict[str, Any]] = {}
    for one in study["cells"]:
        found.setdefault(one["folder"], {**one, "seeds": []})["seeds"].append(one["seed"])
    return list(found.values())


def _intervals(study: Mapping[str, Any], metric: str) -> dict[str, Any]:
    rows = [{"name": name, **one["metrics"][metric]} for name, one in study["experiments"].items()]
    return {"scale": _scale([row[end] for row in rows for end in ("low", "high")]), "rows": rows}


def _differences(study: Mapping[str, Any], metric: str) -> dict[str, Any]:
    rows = [pair for pair in study["pairs"] if pair["metric"] == metric]
    ends = [pair[end] for pair in rows for end in ("low", "high")]
    return {"metric": metric, "rows": rows, "scale": _scale([*ends, 0.0])}


def _scale(values: list[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 1.0)


def _slices(study: Mapping[str, Any], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return a table for each kind of slice and metric: experiments in rows, slices in columns, means over seeds.

    Those of groups of users by a column end with the gap between the groups and what it is by chance, if two groups have
    enough users.
    """
    tables = []
    for metric in metrics:
        for kind in _kinds(study):
            chosen = [one for one in study["slices"] if one["kind"] == kind]
            rows = [
                {"name": name, "values": [one["metrics"].get(name, {}).get(metric, {}).get("mean") for one in chosen]}
                for name in study["experiments"]
            ]
            column = column_of(kind)
            gaps = {
                name: [one["beyond"].get(of(metric, column)) for of in (gap_name, chance_name)]
                for name, one in study["experiments"].items()
            }
            shown = f"{column} of the users" if column else kind
            table = {"metric": metric, "kind": shown, "slices": chosen, "rows": rows}
            tables.append(table | {"gaps": gaps if column and all(map(all, gaps.values())) else {}})
    return tables


def _kinds(study: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(one["kind"] for one in study["slices"]))


def _beyond(study: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns at the headline's cut-off, and the values of each experiment: all cut-offs would not fit a page.

    The gaps between groups by a column are in the tables of these groups.
    """
    cutoff = study["headline"].partition("@")[2]
    names = dict.fromkeys(name for one in study["experiments"].values() for name in one["beyond"])
    of_groups = [column for kind in _kinds(study) if (column := column_of(kind))]
    by_column = {of(m, column) for of in (gap_name, chance_name) for m in study["metrics"] for column in of_groups}
    columns = [name for name in names if name.partition("@")[2] == cutoff and name not in by_column]
    rows = {name: [one["beyond"].get(column) for column in columns] for name, one in study["experiments"].items()}
    return {"columns": columns, "rows": rows}


def planes(study: Mapping[str, Any]) -> list[Chart]:
    """Return the alignment-uniformity planes of users and of items, with hollow points for controls.

    Models whose vectors all point in one direction (MostPop) are excluded: at (0, 0) they would squeeze all others into
    a corner.
    """
    found = []
    for who in ("users", "items"):
        series = []
        for control in (False, True):
            placed = {
                name: (one["geometry"][f"uniformity_{who}"]["mean"], one["geometry"]["alignment"]["mean"])
                for name, one in study["experiments"].items()
                if _has_directions(one["geometry"]) and bool(one["control"]) == control
            }
            if placed:
                x, y = [u for u, _ in placed.values()], [a for _, a in placed.values()]
                hints = [f"{name}: uniformity {u:.3f}, alignment {a:.3f}" for name, (u, a) in placed.items()]
                series.append(Points(x, y, list(placed), hints, "ink" if control else "accent", hollow=control))
        if series:
            found.append(
                Chart(
                    f"alignment-uniformity-{who}",
                    f"Uniformity of {who}",
                    "uniformity (left is more even)",
                    "alignment (lower is closer)",
                    tuple(series),
                    wide=500,
                    high=340,
                )
            )
    return found


def _has_directions(geometry: Mapping[str, Any] | None) -> bool:
    return geometry is not None and any(geometry[f"uniformity_{who}"]["mean"] < -1e-6 for who in ("users", "items"))


def _cost_chart(study: Mapping[str, Any]) -> Chart | None:
    metric = study["headline"]

    def seconds(one: Mapping[str, Any]) -> float:
        return float(one["cost"]["train_seconds"]["mean"])

    placed = {n: one for n, one in study["experiments"].items() if one["cost"]["train_seconds"] and seconds(one) > 0}
    if not placed:
        return None
    values = [one["metrics"][metric]["mean"] for one in placed.values()]
    times = [seconds(one) for one in placed.values()]
    hints = [f"{name}: {time:.1f} s, {value:.4f}" for name, time, value in zip(placed, times, values, strict=True)]
    return Chart(
        "cost",
        f"Training time and {pretty(metric)}",
        "seconds of training, one run",
        pretty(metric),
        (Points(times, values, list(placed), hints),),
        log_x=True,
        wide=500,
        high=340,
    )


def _forest(study: Mapping[str, Any], metric: str) -> Forest:
    ranked: Callable[[Any], float] = lambda one: -one[1]["metrics"][metric]["mean"]  # noqa: E731
    rows = sorted(study["experiments"].items(), key=ranked)
    found = [one["metrics"][metric] for _, one in rows]
    return Forest(
        "intervals-" + metric.replace("@", "-"),
        f"{pretty(metric)} on {study['dataset']}",
        f"{pretty(metric)}, {study['settings']['confidence']:.0%} interval over users{' and splits' if 'splits' in study['settings'] else ''}",
        [name for name, _ in rows],
        [one["mean"] for one in found],
        [one["low"] for one in found],
        [one["high"] for one in found],
    )


def main() -> None:
    """Run the stage: input comparison; outputs page, figures, record."""
    with stage("cm3.reports.pages.study_page") as call:
        facts = study_page(
            comparison=call.inputs["comparison"],
            page_output=call.outputs["page"],
            figures_output=call.outputs["figures"],
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
