"""Targets of the command line: the experiments and studies that they name, and advice for those that do not exist."""

import difflib
from collections.abc import Sequence
from pathlib import PurePath

from cm3.common.strict import nearest
from workflow.plan.config import Config
from workflow.plan.publish import run_command

EXPERIMENT_FILES = ("metrics.json", "report.html")
STUDY_FILES = ("comparison.html", "comparison.json", "comparison.csv")
FILES = {
    *EXPERIMENT_FILES,
    *STUDY_FILES,
    *("per_user.parquet", "recommendations.parquet", "history.csv", "model.safetensors"),
    *("user_embeddings.parquet", "item_embeddings.parquet", "report.stage.json", "page.stage.json", "figures"),
}
"""Files in results/{name} that rules make."""


def names_in(config: Config, targets: Sequence[str]) -> list[str]:
    """Return the experiments and studies that the targets are results of."""
    names = [PurePath(target).parts[1] for target in targets if len(PurePath(target).parts) > 2]
    return [name for name in dict.fromkeys(names) if name in config.experiments or name in config.studies]


def unknown_target(config: Config, targets: Sequence[str]) -> str | None:
    """Return why the first wrong target cannot be made, with the nearest name and all names; None if all seem right."""
    for target in targets:
        folder, *rest = PurePath(target).parts
        if folder != "results" or len(rest) < 2:
            if folder not in ("raw", "processed") and "/" in target:
                return f"{target}: no such target{_nearest_target(config, target)}\n{listing(config)}"
            if "/" not in target:
                return f"{target}: no such target{nearest_name(config, target)}\n{listing(config)}"
            continue
        name, file = rest[0], "/".join(rest[1:])
        if name in config.studies and file in EXPERIMENT_FILES:
            return f"{name} is a study, not an experiment: {run_command(config, 'study', name)}"
        if name in config.experiments and file in STUDY_FILES:
            return f"{name} is an experiment, not a study: {run_command(config, 'report', name)}"
        if name not in config.experiments and name not in config.studies:
            return f"{name}: no such experiment or study{nearest_name(config, name)}\n{listing(config)}"
        if not (file.startswith(("runs/", "mmrec/")) or file in FILES):
            return f"{target}: no such target{_nearest_target(config, target)}"
    return None


def nearest_name(config: Config, name: str) -> str:
    """Return " (did you mean 'x'?)" with the closest experiment or study, empty if none is close."""
    close = difflib.get_close_matches(name, [*config.experiments, *config.studies], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listing(config: Config) -> str:
    """Return the names of all experiments and studies."""
    return f"experiments: {', '.join(config.experiments)}\nstudies: {', '.join(config.studies) or 'none'}"


def _nearest_target(config: Config, target: str) -> str:
    valid = [f"results/{name}/{file}" for name in config.experiments for file in EXPERIMENT_FILES]
    valid += [f"results/{name}/{file}" for name in config.studies for file in STUDY_FILES]
    close = difflib.get_close_matches(target, valid, n=1, cutoff=0.5)
    return nearest(target, close) if close else ""
