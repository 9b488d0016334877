"""Stage `compare`: the runs of a study to comparison.json and comparison.csv, with intervals and tests.

docs/statistics.md describes the two files and how each number is computed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cm3.common.cli import stage
from cm3.common.embeddings import read_embeddings
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.strict import validate
from cm3.reports.analysis.beyond_accuracy import beyond_accuracy
from cm3.reports.analysis.category_calibration import category_divergence
from cm3.reports.analysis.data import Data, read_splits
from cm3.reports.analysis.diversity import intra_list_diversity
from cm3.reports.analysis.findings import main_experiment, sentences
from cm3.reports.analysis.geometry import EmbeddingSample, measure
from cm3.reports.analysis.pairs import ALPHA, CONFIDENCE, best_of, compare_pairs, pairs_to_test
from cm3.reports.analysis.runs import Experiment, Point, Run, read_experiments, read_lists, read_per_user
from cm3.reports.analysis.slices import Slices
from cm3.reports.analysis.spec import StudySpec, check_study, describe_point
from cm3.reports.analysis.statistics import bootstrap_means, distribution, interval, resampled_splits
from cm3.reports.analysis.table import write_csv
from cm3.reports.analysis.user_gap import chance_gaps, group_gaps

log = logging.getLogger("cm3.reports.analysis.compare")

_READERS = 2  # threads; each measures one run


@dataclass(frozen=True)
class Measured:
    """Measurements of one selected run: (M,) means over users, and further numbers by name."""

    means: np.ndarray
    beyond: dict[str, float]
    geometry: dict[str, float] | None
    slices: list[dict[str, float]]


def compare(
    *,
    study: StudySpec,
    inputs: Mapping[str, Path],
    comparison_output: Path,
    table_output: Path,
) -> dict[str, Any]:
    """Compare a study's experiments and write comparison.json and comparison.csv.

    Args:
        study: experiments and runs.
        inputs: the dataset's interactions, items, users, optionally `user_groups`, `interactions-SEED` of further splits,
            and `features.M` of each modality M by which diversity is measured; for each run `evaluation.E.R`, `per_user.E.R`,
            `recommendations.E.R`, `train.E.R`, and for models with embeddings `user_embeddings.E.R` and
            `item_embeddings.E.R`, with experiment E and run R.

    Returns:
        The content of comparison.json.

    Raises:
        UserError: runs without a validation score, missing metrics, different users, masks or monitors, or files that
            do not belong together.
    """
    check_study(study)
    experiments = read_experiments(study, inputs)
    of_splits = read_splits(study, inputs, experiments[0].chosen.runs)
    splits, data = list(of_splits), next(iter(of_splits.values()))
    names, metrics = list(study.experiments), study.metrics
    # Contiguous by user, because the tests read it often.
    averages = np.zeros((len(splits), len(names), len(metrics), len(data.users)))
    entries, measured = {}, {}
    of_points = _measure_points([experiment.chosen for experiment in experiments], of_splits, metrics)
    for e, (experiment, runs) in enumerate(zip(experiments, of_points, strict=True)):
        for run, (values, _) in zip(experiment.chosen.runs, runs, strict=True):
            averages[splits.index(run.spec.split), e] += values.T / (len(runs) // len(splits))
        measured[experiment.name] = found = [each for _, each in runs]
        entries[experiment.name] = _entry(experiment, found, data.sample, metrics)
        log.info(
            "%s: %s %.4f over %d runs, chosen: %s",
            experiment.name,
            metrics[0],
            entries[experiment.name]["metrics"][metrics[0]]["mean"],
            len(found),
            describe_point(experiment.chosen.settings),
        )

    resampled = _resampled(averages, study)
    by_seed = {
        name: {m: _by(experiments[e], "seed", entries[name]["metrics"][m]["values"]) for m in metrics}
        for e, name in enumerate(names)
    }
    by_split = {
        name: {m: _by(experiments[e], "split", entries[name]["metrics"][m]["values"]) for m in metrics}
        for e, name in enumerate(names)
    }
    control_of = {name: spec.control_of for name, spec in study.experiments.items()}
    tested = pairs_to_test(names, study.reference, control_of)
    per_user = np.moveaxis(averages[0] if len(splits) == 1 else averages.mean(0), -1, 0)
    counts = _counts(data, experiments)
    share = counts["test_interactions"] / counts["train_interactions"]
    pairs = compare_pairs(
        tested, names, metrics, per_user, resampled, by_seed, by_split if len(splits) > 1 else None, share
    )
    best = {m: best_of(names, m, {n: entries[n]["metrics"][m]["mean"] for n in names}, pairs) for m in metrics}
    low, high = interval(resampled, CONFIDENCE)
    for e, name in enumerate(names):
        for m, metric in enumerate(metrics):
            marked = best[metric]["marked"] and best[metric]["experiment"] == name
            entries[name]["metrics"][metric] |= {"low": float(low[e, m]), "high": float(high[e, m]), "best": marked}

    monitors = {e.monitor for e in experiments}
    words = sentences(entries, pairs, metrics[0], len(pairs), study.reference)
    result: dict[str, Any] = {
        "study": study.study,
        "dataset": experiments[0].spec.dataset,
        "reference": study.reference,
        "metrics": metrics,
        "headline": metrics[0],
        "main": main_experiment(entries, study.reference),
        "command": study.command,
        "settings": {
            "resamples": study.resamples,
            "confidence": CONFIDENCE,
            "alpha": ALPHA,
            "bootstrap_seed": study.bootstrap_seed,
            "zero_method": "pratt",
            "correction": "holm",
            "tests": len(pairs),
            "mask": experiments[0].chosen.runs[0].evaluation.get("mask"),
            "monitor": monitors.pop() if len(monitors) == 1 else None,
        },
        "counts": counts,
        "words": words,
        "experiments": entries,
        "best": best,
        "pairs": pairs,
        "slices": _slices(data.slices, measured),
        "cells": [
            _run(run, point is e.chosen, metrics) for e in experiments for point in e.points for run in point.runs
        ],
    }
    if len(splits) > 1:
        result["settings"]["splits"] = splits
    if study.search is not None:
        result["search"] = study.search
    write_json(comparison_output, result)
    write_csv(table_output, result)
    for word in words:
        log.info("%s", word["text"])
    return result


def _resampled(averages: np.ndarray, study: StudySpec) -> np.ndarray:
    """Return (B, E, M) means of resampled users, and of resampled splits where there are several, of (S, E, M, n) values."""
    n_splits, n_experiments, n_metrics, n_users = averages.shape
    means = bootstrap_means(averages.reshape(-1, n_users).T, study.resamples, study.bootstrap_seed)
    if n_splits == 1:
        return means.reshape(-1, n_experiments, n_metrics)
    shares = resampled_splits(n_splits, study.resamples, study.bootstrap_seed)
    drawn: np.ndarray = np.einsum("bs,bsem->bem", shares, means.reshape(-1, *averages.shape[:3]))
    return drawn


def _by(experiment: Experiment, what: Literal["seed", "split"], values: Sequence[float]) -> list[float]:
    """Return the mean of the values of the chosen runs for each seed, or for each split."""
    groups: dict[int | None, list[float]] = {}
    for run, value in zip(experiment.chosen.runs, values, strict=True):
        groups.setdefault(run.spec.seed if what == "seed" else run.spec.split, []).append(value)
    return [float(np.mean(group)) if len(group) > 1 else group[0] for group in groups.values()]


def _measure_points(
    points: Sequence[Point], splits: Mapping[int | None, Data], metrics: Sequence[str]
) -> Iterator[list[tuple[np.ndarray, Measured]]]:
    """Yield for each point the (n, M) per-user values and the measurements of its runs."""
    # A closed form does not depend on the seed: its seeds share one run, measured once.
    runs = [{run.spec.run: run for run in point.runs} for point in points]
    with ThreadPoolExecutor(_READERS) as pool:
        different = [run for each in runs for run in each.values()]
        found = pool.map(lambda run: _measure_run(run, splits[run.spec.split], metrics), different)
        for point, each in zip(points, runs, strict=True):
            by_run = dict(zip(each, found, strict=False))
            yield [by_run[run.spec.run] for run in point.runs]


def _measure_run(run: Run, data: Data, metrics: Sequence[str]) -> tuple[np.ndarray, Measured]:
    _, _, values = read_per_user(run, metrics, data.users)
    cutoffs = data.slices.cutoffs
    path = run.files["recommendations"]
    lists = read_lists(path, data.ids, data.users, max(cutoffs))
    overall, means = data.slices.measure(lists)
    for column, metric in enumerate(metrics):
        if metric in overall and not np.allclose(overall[metric], values[:, column], rtol=0, atol=1e-9):
            user = int(data.users[np.abs(overall[metric] - values[:, column]).argmax()])
            raise UserError(
                f"{path}: {metric} of the lists differs from {run.files['per_user']}, for example for user {user}; "
                "delete both and run again"
            )
    geometry = None
    if {"user_embeddings", "item_embeddings"} <= run.files.keys():
        user_rows, item_rows, sample = data.sample.rows()
        users, _ = read_embeddings(run.files["user_embeddings"], "user_id", data.ids.users, user_rows)
        items, _ = read_embeddings(run.files["item_embeddings"], "item_id", data.ids.items, item_rows)
        geometry = measure(users, items, sample)
    kept = [{metric: mean[metric] for metric in metrics if metric in mean} for mean in means]
    beyond = beyond_accuracy(lists, data.counts, data.n_train_users, cutoffs)
    if data.categories is not None:
        beyond |= category_divergence(lists, data.history, data.categories, cutoffs)
    beyond |= intra_list_diversity(lists, data.vectors, cutoffs)
    for by, groups in data.groups.items():
        beyond |= group_gaps(values, metrics, groups, by)
        beyond |= chance_gaps(values, metrics, groups, by) if by else {}
    return values, Measured(values.mean(0), beyond, geometry, kept)


def _entry(
    experiment: Experiment, measured: Sequence[Measured], sample: EmbeddingSample, metrics: Sequence[str]
) -> dict[str, Any]:
    about, chosen = experiment.spec, experiment.chosen
    specs = [run.spec for run in chosen.runs]
    means = np.array([each.means for each in measured])
    geometry: dict[str, Any] | None = None
    if measured[0].geometry is not None:
        geometry = {name: distribution([(m.geometry or {})[name] for m in measured]) for name in measured[0].geometry}
        geometry |= {"pairs": len(sample.pair_users), "users": len(sample.users), "items": len(sample.items)}
    splits = [spec.split for spec in specs if spec.split is not None]
    return {
        "model": about.model,
        "dataset": about.dataset,
        "modalities": about.modalities,
        "control": about.control,
        "control_of": about.control_of,
        "settings": about.settings,
        "point": chosen.settings,
        "seeds": [spec.seed for spec in specs],
        "n_seeds": len({spec.seed for spec in specs}),
        **({"splits": splits, "n_splits": len(set(splits))} if splits else {}),
        "deterministic": about.deterministic or (len(specs) > 1 and len({spec.run for spec in specs}) == 1),
        "runs": [spec.run for spec in specs],
        "commands": [spec.command for spec in specs],
        "command": _one_command([spec.command for spec in specs]),
        "warnings": list(dict.fromkeys(c.record["warning"] for c in chosen.runs if c.record.get("warning"))),
        "monitor": experiment.monitor,
        "valid": distribution(chosen.valid),
        "metrics": {metric: distribution(means[:, column].tolist()) for column, metric in enumerate(metrics)},
        "beyond": {name: distribution([each.beyond[name] for each in measured]) for name in measured[0].beyond},
        "geometry": geometry,
        "cost": _cost(experiment),
        "grid": [_grid_point(point, point is chosen) for point in experiment.points],
    }


def _cost(experiment: Experiment) -> dict[str, Any]:
    chosen = [run.record for run in experiment.chosen.runs]
    runs = {run.spec.run: run.record for point in experiment.points for run in point.runs}

    def over_seeds(field: str) -> dict[str, Any] | None:
        values = [record.get(field) for record in chosen]
        return None if any(value is None for value in values) else distribution([float(v) for v in values])  # type: ignore[arg-type]

    return {
        "train_seconds": over_seeds("wall_seconds"),
        "peak_memory_mb": over_seeds("peak_memory_mb"),
        "seconds_per_epoch": over_seeds("seconds_per_epoch"),
        "epochs": over_seeds("epochs"),
        "parameters": chosen[0].get("parameters"),
        "device": chosen[0].get("device"),
        "all_cells_seconds": sum(record.get("wall_seconds", 0.0) for record in runs.values()),
        "cells": len(runs),
    }


def _grid_point(point: Point, selected: bool) -> dict[str, Any]:
    specs = [run.spec for run in point.runs]
    return {
        "point": point.settings,
        "selected": selected,
        "valid": distribution(point.valid),
        "seeds": [spec.seed for spec in specs],
        "runs": [spec.run for spec in specs],
        "commands": [spec.command for spec in specs],
    }


def _run(run: Run, selected: bool, metrics: Sequence[str]) -> dict[str, Any]:
    spec = run.spec
    return {
        "experiment": spec.experiment,
        "run": spec.run,
        "seed": spec.seed,
        **({} if spec.split is None else {"split": spec.split}),
        "point": spec.point,
        "keys": spec.keys,
        "folder": run.folder,
        "command": spec.command,
        "valid": run.valid,
        "selected": selected,
        # No test score of a point that was not selected, so that nobody can select by it.
        "metrics": {metric: run.evaluation["test"][metric] for metric in metrics} if selected else None,
    }


def _counts(data: Data, experiments: Sequence[Experiment]) -> dict[str, int]:
    return {
        "users": len(data.interactions.user_ids),
        "items": len(data.interactions.item_ids),
        "train_interactions": int(data.counts.sum()),
        "test_users": len(data.users),
        "test_interactions": int(data.slices.truth.nnz),
        "cold_items": int((data.counts == 0).sum()),
        "experiments": len(experiments),
        "cells": sum(len(point.runs) for e in experiments for point in e.points),
        "runs": len({run.folder for e in experiments for point in e.points for run in point.runs}),
    }


def _slices(slices: Slices, measured: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    rows = []
    for number, one in enumerate(slices.slices):
        means = {name: [each.slices[number] for each in seeds] for name, seeds in measured.items()}
        # A slice of items can have no test users on some of the splits.
        by_experiment = {
            name: {m: distribution([x[m] for x in runs if x]) for m in runs[0]} for name, runs in means.items()
        }
        rows.append({**asdict(one), "metrics": by_experiment if one.users else {}})
    return rows


def _one_command(commands: Sequence[str]) -> str:
    # "snakemake --cores 8 A" and "snakemake --cores 8 B" are one command with two targets.
    parts = [command.rpartition(" ") for command in dict.fromkeys(commands)]
    if len({head for head, _, _ in parts}) == 1:
        return f"{parts[0][0]} {' '.join(target for _, _, target in parts)}".strip()
    return " && ".join(dict.fromkeys(commands))


def main() -> None:
    """Run the stage: spec of `StudySpec`; inputs as in `compare`; outputs comparison, table, record."""
    with stage("cm3.reports.analysis.compare") as call:
        result = compare(
            study=validate(StudySpec, call.spec, "study"),
            inputs=call.inputs,
            comparison_output=call.outputs["comparison"],
            table_output=call.outputs["table"],
        )
        call.record.update(counts=result["counts"], tests=result["settings"]["tests"])


if __name__ == "__main__":
    main()
