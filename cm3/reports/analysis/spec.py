"""The specification of a comparison: the study's experiments and runs."""

from typing import Any

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest


class ExperimentSpec(Strict):
    """One experiment of a study: a model with its features."""

    model: str = Field(description="name of the model, such as cm3 or lightgcn")
    dataset: str
    modalities: dict[str, str] = Field({}, description="extractor by modality; empty for a model without content")
    control: dict[str, str] | None = Field(None, description="control that replaces the features, by modality")
    control_of: str | None = Field(None, description="the experiment whose control this is")
    settings: dict[str, Any] = Field({}, description="settings of model and training by dotted key, without the seed")
    deterministic: bool = Field(False, description="the model is the same for every seed, as in a closed form")


class RunSpec(Strict):
    """One run: an experiment with a seed, a grid point and, in a study over several splits, the seed of its split."""

    experiment: str
    run: str = Field(description="key of the run, as in its folder's name")
    seed: int
    split: int | None = Field(None, description="seed of the split; null in a study over one split")
    point: dict[str, Any] = Field({}, description="value by dotted setting; empty without a grid")
    command: str = Field(description="command that repeats this run")
    keys: dict[str, Any] = Field({}, description="further keys, copied to the output")


class StudySpec(Strict):
    """A study: the runs to compare, and how."""

    study: str
    command: str = Field(description="command that repeats the comparison")
    reference: str | None = Field(None, description="null tests all pairs; a name tests each against that experiment")
    metrics: list[str] = Field(min_length=1, description="metrics to test; the sentences refer to the first")
    experiments: dict[str, ExperimentSpec] = Field(min_length=1)
    cells: list[RunSpec]
    search: dict[str, Any] | None = Field(
        None, description="settings and trials of the study's search (`workflow.plan.searched`), copied to the output"
    )
    resamples: int = Field(10_000, ge=100, description="bootstrap resamples of the users")
    bootstrap_seed: int = Field(0, ge=0)


def check_study(study: StudySpec) -> None:
    """Check that the parts of a study fit together.

    Raises:
        UserError: an unknown experiment, several datasets, an experiment without runs, a duplicate run, or grid points
            with different seeds or splits.
    """
    where = f"studies.{study.study}"
    for name in (study.reference, *(e.control_of for e in study.experiments.values())):
        if name is not None and name not in study.experiments:
            raise UserError(f"{where}: {name!r} is not one of its experiments{nearest(name, study.experiments)}")
    datasets = {name: e.dataset for name, e in study.experiments.items()}
    if len(set(datasets.values())) > 1:
        on = ", ".join(f"{name} on {dataset}" for name, dataset in datasets.items())
        raise UserError(
            f"{where}: all experiments of a study need the same dataset, but found {on}; define one study per dataset"
        )
    if len(set(study.metrics)) < len(study.metrics):
        raise UserError(f"{where}.metrics = {study.metrics}: duplicate metric; remove one")
    seeds: dict[str, dict[str, list[tuple[int | None, int]]]] = {name: {} for name in study.experiments}
    for run in study.cells:
        if run.experiment not in seeds:
            raise UserError(
                f"{where}: run {run.run} belongs to {run.experiment!r}, which is not one of its experiments"
                f"{nearest(run.experiment, study.experiments)}"
            )
        found = seeds[run.experiment].setdefault(describe_point(run.point), [])
        if (run.split, run.seed) in found:
            raise UserError(
                f"{where}: {run.experiment} at {describe_point(run.point)} has {describe_seed(run)} twice; "
                "give each seed once"
            )
        found.append((run.split, run.seed))
    _check_splits(study, where)
    for name, points in seeds.items():
        if not points:
            raise UserError(f"{where}: {name} has no run; remove it from the study or give it a seed")
        (first, expected), *others = points.items()
        for point, found in others:
            if set(found) != set(expected):
                raise UserError(
                    f"{where}: {name} has seeds {_seeds(expected)} at {first}, but {_seeds(found)} at {point}; points are "
                    "selected by their mean over the same seeds"
                )


def _check_splits(study: StudySpec, where: str) -> None:
    """Raise a UserError unless every experiment has each of its seeds on each split of the study."""
    splits = {run.split for run in study.cells}
    by_seed: dict[tuple[str, str, int], set[int | None]] = {}
    for run in study.cells:
        by_seed.setdefault((run.experiment, describe_point(run.point), run.seed), set()).add(run.split)
    for (name, point, seed), found in by_seed.items():
        if found != splits:
            raise UserError(
                f"{where}: {name} at {point} has seed {seed} on {len(found)} of {len(splits)} splits; models are "
                "compared on the same splits"
            )


def _seeds(runs: list[tuple[int | None, int]]) -> list[int]:
    return [seed for _, seed in runs]


def describe_seed(run: RunSpec) -> str:
    """Return the seed of a run, and that of its split in a study over several."""
    return f"seed {run.seed}" + (f" on split {run.split}" if run.split is not None else "")


def describe_point(point: dict[str, Any]) -> str:
    """Return a grid point as text, such as "model.gamma = 0.5, training.lr = 0.001"."""
    return ", ".join(f"{name} = {value}" for name, value in point.items()) or "the config's settings"
