"""Comparisons: the runs of a study, the files that the comparison reads of each, and its task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cm3.evaluation.rerank_config import Rerank
from workflow.plan import runs
from workflow.plan.config import Config
from workflow.plan.data import split_spec, user_groups_path
from workflow.plan.experiments import Experiment
from workflow.plan.publish import command
from workflow.plan.runs import features_of, run_key, tables
from workflow.plan.searched import check_searched, search_spec
from workflow.plan.task import Task

EVALUATED = {
    "evaluation": "evaluation.json",
    "per_user": "per_user.parquet",
    "recommendations": "recommendations.parquet",
}
"""Files of a run's evaluation that the comparison reads."""
TRAINED = {
    "train": runs.TRAINED,
    "user_embeddings": "user_embeddings.parquet",
    "item_embeddings": "item_embeddings.parquet",
}
"""Files of a run's training that the comparison reads; embeddings only of models that have them."""


def compare_inputs(config: Config, study: str) -> dict[str, str]:
    """Return the tables of the dataset, the groups of its users, the features of diversity, and the files of each run.

    These are `evaluation.EXPERIMENT.RUN`, `per_user.EXPERIMENT.RUN`, and so on.
    """
    check_searched(config, study)
    points, splits = config.studies[study].points, config.studies[study].splits
    first = next(iter(points))
    paths = tables(config, first) | _content(config, study)
    paths |= user_groups_path(config, config.experiments[first].dataset)
    for seed in splits:
        if seed is not None:
            paths[f"interactions-{seed}"] = tables(config, first, seed)["interactions"]
    for name in points:
        for entry in _runs(config, study, name):
            run = entry["run"]
            trained = runs.training_folder(config, name, run)
            of_run = {kind: f"results/{name}/runs/{run}/{file}" for kind, file in EVALUATED.items()}
            of_run |= {
                kind: f"{trained}/{file}"
                for kind, file in TRAINED.items()
                if config.experiments[name].model.exports == "embeddings" or not kind.endswith("_embeddings")
            }
            paths |= {f"{kind}.{name}.{run}": path for kind, path in of_run.items()}
    return paths


def _content(config: Config, study: str) -> dict[str, str]:
    """Return `features.{modality}` of the first experiment that has features without a control, empty if none has.

    One set of features for all, so that the lists of models without modalities are measured, too.
    """
    for name in config.studies[study].points:
        chosen = config.experiments[name]
        if chosen.modalities and not chosen.controls:
            return {f"features.{modality}": path for modality, path in features_of(config, chosen).items()}
    return {}


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


def study_runs(config: Config, study: str) -> Task:
    """Return the task of listing the runs of a study and their files, which follow where runs are trained."""
    task = compare(config, study)
    elsewhere = {
        f"{name}/{entry['run']}": trained
        for name in config.studies[study].points
        for entry in _runs(config, study, name)
        if (trained := runs.trained_in(config, name, entry["run"])) != name
    }
    return replace(task, decides=[task.decides, elsewhere]) if elsewhere else task


def compare_call(config: Config, study: str) -> dict[str, Any]:
    """Return the arguments of `cm3.reports.analysis.compare` as one JSON value, with the inputs below a root of the job's."""
    task = compare(config, study)
    return {"spec": task.spec, "runtime": {}, "inputs": compare_inputs(config, study), "code": task.version}


def _runs(config: Config, study: str, experiment: str) -> list[dict[str, Any]]:
    entries = []
    repeated = len(config.studies[study].splits) > 1
    for point, seed, settings in config.studies[study].settings(experiment):
        run = run_key(config, settings)
        split = split_spec(config, settings.dataset, settings.split_seed)["seed"]
        entries.append(
            {
                "experiment": experiment,
                "run": run,
                "seed": seed,
                **({"split": split} if repeated else {}),
                "point": dict(point.values),
                "command": command(config, f"results/{experiment}/runs/{run}/evaluation.json"),
                "keys": {"features": {m: Path(path).stem for m, path in features_of(config, settings).items()}},
            }
        )
    return entries


def _described(config: Config, experiment: str, others: Sequence[str]) -> dict[str, Any]:
    chosen = config.experiments[experiment]
    without, controls = _without_control(config, experiment), _controls(config, experiment)
    originals = (
        other for other in others if not _controls(config, other) and _without_control(config, other) == without
    )
    return {
        "model": chosen.model_name,
        "dataset": chosen.dataset,
        "modalities": chosen.feature_names(),
        "control": controls or None,
        "control_of": next(originals, None) if controls else None,
        "settings": _settings(chosen),
        "deterministic": run_key(config, chosen.with_seed(0)) == run_key(config, chosen.with_seed(1)),
    }


def _settings(chosen: Experiment) -> dict[str, Any]:
    sections = {"model": chosen.model.identity(), "training": chosen.training_settings()}
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {key: value for key, value in settings.items() if key not in ("training.seed", "model.name")}


def _controls(config: Config, experiment: str) -> dict[str, str]:
    """Return the control by modality: of the experiment, or of those that its re-ranking combines."""
    chosen = config.experiments[experiment]
    if not isinstance(chosen.model, Rerank):
        return dict(chosen.controls)
    parts = (_controls(config, name) for name in (chosen.model.of, *chosen.model.by))
    return {modality: kind for part in parts for modality, kind in part.items()}


def _without_control(config: Config, experiment: str) -> list[Any]:
    """Return what an experiment and its controls have in common, and no other experiment."""
    chosen = config.experiments[experiment]
    model, training = chosen.model.identity(), chosen.training_identity()
    if isinstance(chosen.model, Rerank):
        names = (chosen.model.of, *chosen.model.by)
        own = {key: value for key, value in model.items() if key not in ("of", "by", "weights")}
        weights = [chosen.model.weights.get(name) for name in chosen.model.by]
        return [chosen.dataset, own, weights, training, [_without_control(config, name) for name in names]]
    return [chosen.dataset, list(chosen.feature_names().items()), chosen.model_name, model, training]


def _without_command(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "command"}
