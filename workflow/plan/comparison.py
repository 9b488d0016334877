"""Comparisons: the runs of a study, the files that the comparison reads of each, and its task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow.plan.config import Config
from workflow.plan.experiments import Experiment
from workflow.plan.publish import command
from workflow.plan.runs import features_of, run_key, tables
from workflow.plan.searched import check_searched, search_spec
from workflow.plan.task import Task

COMPARED = {
    "evaluation": "evaluation.json",
    "per_user": "per_user.parquet",
    "recommendations": "recommendations.parquet",
    "train": "train.stage.json",
    "user_embeddings": "user_embeddings.parquet",
    "item_embeddings": "item_embeddings.parquet",
}
"""Files of a run that the comparison reads; embeddings only of models that have them."""


def compare_inputs(config: Config, study: str) -> dict[str, str]:
    """Return the tables of the dataset, and the files of each run as `evaluation.EXPERIMENT.RUN`, `per_user....`, ..."""
    check_searched(config, study)
    points = config.studies[study].points
    paths = tables(config, next(iter(points)))
    for name in points:
        for entry in _runs(config, study, name):
            run = entry["run"]
            paths |= {
                f"{kind}.{name}.{run}": f"results/{name}/runs/{run}/{file}"
                for kind, file in COMPARED.items()
                if config.experiments[name].model.exports == "embeddings" or not kind.endswith("_embeddings")
            }
    return paths


def compare(config: Config, study: str) -> Task:
    """Return the task of comparing the runs of a study."""
    check_searched(config, study)
    chosen = config.studies[study]
    spec: dict[str, Any] = {
        "study": study,
        "command": command(config, f"results/{study}/comparison.json"),
        "reference": chosen.reference,
        "metrics": list(chosen.metrics),
        "experiments": {name: _described(config, name, list(chosen.points)) for name in chosen.points},
        "cells": [entry for name in chosen.points for entry in _runs(config, study, name)],
        **search_spec(config, study),
    }
    decides = _without_command(spec) | {"cells": [_without_command(entry) for entry in spec["cells"]]}
    return Task("compare", spec, decides=decides)


def compare_call(config: Config, study: str) -> dict[str, Any]:
    """Return the arguments of `cm3.reports.analysis.compare` as one JSON value, with the inputs below a root of the job's."""
    task = compare(config, study)
    return {"spec": task.spec, "runtime": {}, "inputs": compare_inputs(config, study), "code": task.version}


def _runs(config: Config, study: str, experiment: str) -> list[dict[str, Any]]:
    entries = []
    for point, seed, settings in config.studies[study].settings(experiment):
        run = run_key(config, settings)
        entries.append(
            {
                "experiment": experiment,
                "run": run,
                "seed": seed,
                "point": dict(point.values),
                "command": command(config, f"results/{experiment}/runs/{run}/evaluation.json"),
                "keys": {"features": {m: Path(path).stem for m, path in features_of(config, settings).items()}},
            }
        )
    return entries


def _described(config: Config, experiment: str, others: Sequence[str]) -> dict[str, Any]:
    chosen = config.experiments[experiment]
    without = _without_control(config, experiment)
    originals = (
        other
        for other in others
        if not config.experiments[other].controls and _without_control(config, other) == without
    )
    return {
        "model": chosen.model_name,
        "dataset": chosen.dataset,
        "modalities": dict(chosen.modalities),
        "control": dict(chosen.controls) or None,
        "control_of": next(originals, None) if chosen.controls else None,
        "settings": _settings(chosen),
        "deterministic": run_key(config, chosen.with_seed(0)) == run_key(config, chosen.with_seed(1)),
    }


def _settings(chosen: Experiment) -> dict[str, Any]:
    sections = {"model": chosen.model.identity(), "training": chosen.training_settings()}
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {key: value for key, value in settings.items() if key not in ("training.seed", "model.name")}


def _without_control(config: Config, experiment: str) -> list[Any]:
    chosen = config.experiments[experiment]
    model, training = chosen.model.identity(), chosen.training_identity()
    return [chosen.dataset, list(chosen.modalities.items()), chosen.model_name, model, training]


def _without_command(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "command"}
