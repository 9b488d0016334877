"""Summary of new results, printed at the end of a run."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm3.common.files import read_json


def print_summary(experiments: Iterable[str], studies: Iterable[str], since: float) -> None:
    """Print results written after `since` (Unix seconds): test metrics of experiments, paths of comparisons."""
    for experiment in experiments:
        path = Path(f"results/{experiment}/metrics.json")
        if _written(path, since):
            print(summary(read_json(path), path.parent), file=sys.stderr)
    for study in studies:
        folder = Path(f"results/{study}")
        made = [path for path in sorted(folder.glob("comparison.*")) if _written(path, since)]
        if made:
            print("\n".join(["", f"{study}: compared", *(f"  {path}" for path in made)]), file=sys.stderr)


def _written(path: Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime >= since


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """Return a table of the test metrics, with metrics as rows and cut-offs as columns, and the paths of the results."""
    values = {tuple(name.split("@")): value for name, value in metrics["test"].items()}
    names = list(dict.fromkeys(name for name, _ in values))
    cuts = sorted({cut for _, cut in values}, key=int)
    config = metrics["config"]
    control = config.get("control") or {}
    features = ", ".join(
        f"{m} {config['extractors'][m]['name']}" + (f" as {control[m]}" if m in control else "")
        for m in config["modalities"]
    )
    model = config["model"]["name"]
    lines = [
        "",
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
