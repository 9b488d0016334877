"""What a comparison is told: the study's experiments and cells."""

from typing import Any

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest


class ExperimentSpec(Strict):
    """One model with its features, as the study names it."""

    model: str = Field(description="name of the model, such as cm3 or lightgcn")
    dataset: str
    modalities: dict[str, str] = Field({}, description="extractor by modality; empty for a model without content")
    control: dict[str, str] | None = Field(None, description="what stands in place of a modality's features")
    control_of: str | None = Field(None, description="the experiment that this is the control of")


class CellSpec(Strict):
    """One run: an experiment at a seed and a grid point."""

    experiment: str
    run: str = Field(description="key of the run, as in its folder's name")
    seed: int
    point: dict[str, Any] = Field({}, description="value by dotted setting; empty without a grid")
    command: str = Field(description="what makes this cell again")
    keys: dict[str, Any] = Field({}, description="further keys, kept as they are")


class StudySpec(Strict):
    """A study: which runs are compared, and how."""

    study: str
    command: str = Field(description="what makes the comparison again")
    reference: str | None = Field(None, description="null tests all pairs; a name tests each against that experiment")
    metrics: list[str] = Field(min_length=1, description="columns; the first is the one that sentences speak of")
    experiments: dict[str, ExperimentSpec] = Field(min_length=1)
    cells: list[CellSpec]
    resamples: int = Field(10_000, ge=100, description="bootstrap resamples of the users")
    bootstrap_seed: int = Field(0, ge=0)


def check_study(study: StudySpec) -> None:
    """Check that the parts of a study fit together.

    Raises:
        UserError: a name that is not an experiment's, several datasets, an experiment without cells, a cell that
            stands there twice, or points of a grid with different seeds.
    """
    where = f"studies.{study.study}"
    for name in (study.reference, *(e.control_of for e in study.experiments.values())):
        if name is not None and name not in study.experiments:
            raise UserError(f"{where}: {name!r} is not one of its experiments{nearest(name, study.experiments)}")
    datasets = {name: e.dataset for name, e in study.experiments.items()}
    if len(set(datasets.values())) > 1:
        told = ", ".join(f"{name} on {dataset}" for name, dataset in datasets.items())
        raise UserError(f"{where}: experiments of one study share one dataset, but there are {told}; make a study each")
    if len(set(study.metrics)) < len(study.metrics):
        raise UserError(f"{where}.metrics = {study.metrics}: a metric stands there twice; leave one of them out")
    seeds: dict[str, dict[str, list[int]]] = {name: {} for name in study.experiments}
    for cell in study.cells:
        if cell.experiment not in seeds:
            raise UserError(
                f"{where}: run {cell.run} is of {cell.experiment!r}, not one of its experiments"
                f"{nearest(cell.experiment, study.experiments)}"
            )
        found = seeds[cell.experiment].setdefault(describe_point(cell.point), [])
        if cell.seed in found:
            raise UserError(
                f"{where}: {cell.experiment} at {describe_point(cell.point)} has seed {cell.seed} twice; "
                "give each seed once"
            )
        found.append(cell.seed)
    for name, points in seeds.items():
        if not points:
            raise UserError(f"{where}: {name} has no cell; leave it out of the study or give it a seed")
        (first, expected), *others = points.items()
        for point, found in others:
            if sorted(found) != sorted(expected):
                raise UserError(
                    f"{where}: {name} has seeds {expected} at {first}, but {found} at {point}; points are chosen by "
                    "their mean over the same seeds"
                )


def describe_point(point: dict[str, Any]) -> str:
    """Return a grid point as text, such as "model.gamma = 0.5, training.lr = 0.001"."""
    return ", ".join(f"{name} = {value}" for name, value in point.items()) or "the config's settings"
