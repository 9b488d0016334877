"""Summary of new results, printed at the end of a run: metrics, tables of studies, warnings, and what to look at next."""

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json
from workflow.plan.config import Config
from workflow.plan.publish import run_command

MOST_METRICS = 4
"""Columns of the table of a study; comparison.csv has all metrics."""


def print_summary(
    config: Config, names: Iterable[str], since: float = 0.0, warnings: Sequence[str] = (), log: str | None = None
) -> None:
    """Print the results in results/{name} that were written after `since` (Unix seconds).

    Args:
        config: the configuration.
        names: of experiments and studies.
        since: start of the run.
        warnings: of the run's jobs.
        log: the file of Snakemake's own messages.
    """
    lines: list[str] = []
    for name in names:
        folder = Path("results", name)
        path = folder / ("comparison.csv" if name in config.studies else "metrics.json")
        made = [file for file in sorted(folder.glob("[!.]*.*")) if _written(file, since)]
        if name in config.studies:
            made = [file for file in made if file.name.startswith("comparison.")]
            lines += study_summary(path, name, made) if made else []
        elif path in made:
            lines += ["", summary(read_json(path), folder)]
        elif folder / "report.html" in made:
            lines += ["", f"{name}:", f"  {folder / 'report.html'}"]
        lines += next_steps(config, name, made) if made else []
    if warnings:
        lines += ["", "Warnings:", *(f"  {line}" for text in warnings for line in text.split("\n"))]
    if log:
        lines += ["", f"Snakemake's own messages: {_relative(log)}"]
    if lines:
        print("\n".join(lines), file=sys.stderr)


def _written(path: Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime >= since


def _relative(path: str) -> Path:
    here = Path(path)
    return here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here


def next_steps(config: Config, name: str, made: Sequence[Path]) -> list[str]:
    """Return commands for the page of an experiment or study, and for a study of the experiment."""
    steps = []
    pages = {"report.html", "comparison.html"} & {path.name for path in made}
    if not pages:
        about = "a page with the table, charts and tests"
        if name in config.experiments:
            about = "a page with curves, images, neighbours and users"
        steps.append((run_command(config, "report", name), about))
    studies = [study for study, settings in config.studies.items() if name in settings.points]
    if studies and name in config.experiments:
        smallest = min(studies, key=lambda study: len(config.studies[study].points))
        points = len(config.studies[smallest].points)
        steps.append((run_command(config, "study", smallest), f"a comparison of {points} models"))
    width = max((len(command) for command, _ in steps), default=0)
    found = [f"  open  {path}" for path in made if path.name in pages]
    found += [f"  {command:<{width}}   {about}" for command, about in steps]
    return ["", "Next:", *found] if found else []


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """Return a table of the test metrics, with metrics as rows and cut-offs as columns, and the paths of the results."""
    values = {tuple(name.split("@")): value for name, value in metrics["test"].items()}
    names = list(dict.fromkeys(name for name, _ in values))
    cuts = sorted({cut for _, cut in values}, key=int)
    config = metrics["config"]
    control = config.get("control") or {}
    reduced = metrics.get("reduced", {})
    features = ", ".join(
        f"{m} {config['extractors'][m]['name']}"
        + (f" reduced to {reduced[m]['dim']} numbers" if m in reduced else "")
        + (f" as {control[m]}" if m in control else "")
        for m in config["modalities"]
    )
    model = config["model"]["name"]
    if rerank := metrics.get("rerank"):
        features = f"{rerank['of']} and {', '.join(rerank['weights'])}"
    lines = [
        f"{metrics['experiment']}: {'CM3' if model == 'cm3' else model} on {metrics['dataset']} ({features or 'no features'})",
        f"  {'test':<12}" + "".join(f"{'@' + cut:>9}" for cut in cuts),
    ]
    for name in names:
        lines.append(f"  {name:<12}" + "".join(f"{values[name, cut]:>9.4f}" for cut in cuts))
    if "warning" in metrics:
        lines += ["", f"  WARNING: {metrics['warning']}"]
    lines += ["", f"  {folder / 'metrics.json'}"]
    lines += [f"  {path}" for path in sorted(folder.glob("[!.]*.*")) if path.name != "metrics.json"]
    return "\n".join(lines)


def study_summary(table: Path, study: str, made: Sequence[Path]) -> list[str]:
    """Return the table of a study, the best model first: means over seeds and users of its first metrics."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["slice"] == "all" and row["low"]]
    except OSError as error:
        raise UserError(f"{table}: {error.strerror}") from None
    metrics = list(dict.fromkeys(row["metric"] for row in rows))[:MOST_METRICS]
    values = {(row["experiment"], row["metric"]): float(row["mean"]) for row in rows}
    seeds = {row["experiment"]: row["seeds"] for row in rows}
    splits = rows[0].get("splits") if rows else None
    names = sorted(seeds, key=lambda name: -values[name, metrics[0]]) if metrics else []
    width = max(map(len, names), default=0)
    over = f" over {splits} random splits" if splits else ""
    lines = [
        "",
        f"{study}: test metrics{over}",
        f"  {'':<{width}}  seeds" + "".join(f"{metric:>14}" for metric in metrics),
    ]
    for name in names:
        cells = "".join(f"{values[name, metric]:>14.4f}" for metric in metrics)
        lines.append(f"  {name:<{width}}  {seeds[name]:>5}{cells}")
    return [*lines, "", *(f"  {path}" for path in made)]
