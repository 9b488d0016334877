"""Studies: experiments on one dataset, compared over seeds and grids of settings."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field, field_validator

from cm3.common.errors import UserError
from cm3.common.keys import canonical_json
from cm3.common.strict import Strict, nearest, validate
from cm3.datasets.spec import SourceSpec
from cm3.evaluation.registry import METRICS
from extractors.spec import BackendSpec
from workflow.plan.experiments import Experiment, check
from workflow.plan.searches import ExperimentState, Range, Search, SearchSection, parse_space
from workflow.plan.split_repeats import split_seeds

DEFAULT_METRICS = ("recall", "ndcg")
SECTIONS = ("model", "training")

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Values = Annotated[list[Any], Field(min_length=1)]


class StudySplit(Strict):
    """Splits of a study."""

    repeats: int = Field(
        default=1,
        ge=1,
        description="number of random splits on which each experiment is trained with each seed: those of the dataset's "
        "split.seed, and of the numbers after it; only for split.strategy random",
    )


class StudySection(Strict):
    """One entry of `studies`."""

    experiments: list[str] = Field(min_length=1, description="names under experiments, of one dataset")
    seeds: list[Seed] = Field(
        [1, 2, 3, 4, 5],
        min_length=1,
        description="values of training.seed; each experiment is trained once with each of them",
    )
    split: StudySplit = StudySplit()
    grids: dict[str, dict[str, Values]] = Field(
        default_factory=dict,
        description="experiment -> key -> values, such as model.gamma: [0.5, 0.9]; every combination is trained, and the "
        "one with the best mean validation score over the seeds is compared",
    )
    search: SearchSection | None = Field(
        None, description="settings that Optuna searches by validation (./run search STUDY); the best are compared"
    )
    reference: str | None = Field(
        None, description="experiment that every other one is tested against; null: all pairs are tested"
    )
    metrics: list[str] | None = Field(
        None,
        min_length=1,
        description="metrics to test, such as recall@20; null: recall and ndcg at the cut-offs of all "
        "experiments, the monitored one first",
    )

    @field_validator("experiments", "seeds", "metrics")
    @classmethod
    def _once(cls, value: list[Any] | None) -> list[Any] | None:
        for entry in value or ():
            if value and value.count(entry) > 1:
                raise ValueError(f"duplicate value: {entry!r}")
        return value


@dataclass(frozen=True)
class Point:
    """An experiment at one combination of its grid's values; an experiment without a grid has one point without values."""

    values: Mapping[str, Any]
    experiment: Experiment


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        points: the grid points of each experiment, in the order of the configuration; the best trials of an experiment
            that is searched, none before its search has finished.
        trials: the points that a search has chosen so far; each is trained with the first seed on the dataset's split.
        splits: seeds of the splits; None is the dataset's own, which comes first.
    """

    points: Mapping[str, Sequence[Point]]
    seeds: Sequence[int]
    reference: str | None
    metrics: Sequence[str]
    search: Search | None = None
    trials: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    splits: Sequence[int | None] = (None,)

    def trial_settings(self, experiment: str) -> list[Experiment]:
        """Return the settings of the trials of an experiment's search."""
        return [point.experiment.with_seed(self.seeds[0]) for point in self.trials.get(experiment, ())]

    def settings(self, experiment: str) -> list[tuple[Point, int, Experiment]]:
        """Return (grid point, seed, settings) of each run of an experiment: each point on each split with each seed."""
        return [
            (point, seed, point.experiment.on_split(split).with_seed(seed))
            for point in self.points[experiment]
            for split in self.splits
            for seed in self.seeds
        ]


def parse_study(
    data: Mapping[str, Any],
    experiments: Mapping[str, Experiment],
    datasets: Mapping[str, SourceSpec],
    extractors: Mapping[str, BackendSpec],
    where: str,
    states: Mapping[str, ExperimentState] | None = None,
) -> Study:
    """Return a section of `studies`, expanded.

    Args:
        data: the section.
        experiments: all checked experiments.
        datasets, extractors: all checked ones, by name.
        where: the key path of the section.
        states: what its search has found, by experiment.

    Raises:
        UserError: one line per fault: unknown names and keys, invalid values, experiments that are not comparable.
    """
    section = validate(StudySection, data, where)
    faults = [
        f"{where}.experiments = {name!r}: no such name{nearest(name, experiments)}"
        for name in section.experiments
        if name not in experiments
    ]
    searched = section.search.spaces if section.search else {}
    named = [("reference", section.reference), *((f"grids.{name}", name) for name in section.grids)]
    for path, name in [*named, *((f"search.spaces.{name}", name) for name in searched)]:
        if name is not None and name not in section.experiments:
            faults.append(f"{where}.{path}: the study has no experiment {name!r}{nearest(name, section.experiments)}")
    if faults:
        raise UserError("\n".join(faults))
    compared = {name: experiments[name] for name in section.experiments}
    splits: Sequence[int | None] = (None,)
    faults += _incomparable(compared, where)
    try:
        splits = split_seeds(section.split.repeats, compared, experiments, datasets, extractors, where)
    except UserError as error:
        faults.append(str(error))
    faults += [
        f"{where}.search.spaces.{name}: the experiment has a grid, too; remove one of them"
        for name in searched
        if name in section.grids
    ]
    points: dict[str, Sequence[Point]] = {}
    trials: dict[str, Sequence[Point]] = {}
    spaces = {}
    for name, experiment in compared.items():
        try:
            if name in searched and section.search is not None:
                at = f"{where}.search.spaces.{name}"
                spaces[name] = _space(experiment, searched[name], at)
                state = (states or {}).get(name)
                trials[name] = _known(experiment, [t.values for t in state.trials] if state else [], at)
                best = state.best(section.search.finalists) if state and state.finished else []
                points[name] = _known(experiment, [t.values for t in best], at)
                continue
            points[name] = _expand(experiment, section.grids.get(name, {}), f"{where}.grids.{name}")
        except UserError as error:
            faults.append(str(error))
    metrics = _metrics(section.metrics, compared, where, faults)
    if faults:
        raise UserError("\n".join(faults))
    search = Search(section.search, spaces, states or {}) if section.search else None
    return Study(points, section.seeds, section.reference, metrics, search, trials, splits)


def _space(
    experiment: Experiment, space: Mapping[str, list[Any] | Range], where: str
) -> Mapping[str, list[Any] | Range]:
    for path in space:
        _check_path(experiment, path, where)
    return parse_space(space, lambda values: point_of(experiment, values, where), where)


def _known(experiment: Experiment, trials: Sequence[Mapping[str, Any]], where: str) -> list[Point]:
    """Return the points of trials; those of an earlier configuration that the experiment cannot have are left out."""
    points = []
    for values in trials:
        with contextlib.suppress(UserError):
            points.append(point_of(experiment, values, where))
    return points


def _incomparable(experiments: Mapping[str, Experiment], where: str) -> list[str]:
    first, *others = experiments
    faults = []
    for name in others:
        for what in ("dataset", "evaluation.score", "evaluation.mask", "evaluation.top_n"):
            values = []
            for experiment in (experiments[first], experiments[name]):
                value: Any = experiment
                for part in what.split("."):
                    value = getattr(value, part)
                values.append(value)
            if values[0] != values[1]:
                faults.append(
                    f"{where}.experiments: {first} has {what} {values[0]!r} and {name} {values[1]!r}; experiments are comparable only if it is equal"
                )
    return faults


def _expand(experiment: Experiment, grid: Mapping[str, Sequence[Any]], where: str) -> list[Point]:
    """Return a point for every combination of the grid's values, each checked like an experiment."""
    for path in grid:
        _check_path(experiment, path, where)
    points: dict[str, Point] = {}
    faults: dict[str, None] = {}
    for combination in itertools.product(*(grid[path] for path in sorted(grid))):
        try:
            point = point_of(experiment, dict(zip(sorted(grid), combination, strict=True)), where)
        except UserError as error:
            faults |= dict.fromkeys(str(error).splitlines())
            continue
        key = canonical_json(point.values)
        if key in points:
            faults[f"{where}: duplicate grid point: {key}"] = None
        points[key] = point
    if faults:
        raise UserError("\n".join(faults))
    return list(points.values())


def _check_path(experiment: Experiment, path: str, where: str) -> None:
    section, _, key = path.partition(".")
    if section not in SECTIONS:
        raise UserError(
            f"{where}.{path}: unknown key; a grid's keys are model.KEY or training.KEY{nearest(section, SECTIONS)}"
        )
    settings = type(getattr(experiment, section))
    if path == "training.seed":
        raise UserError(f"{where}.{path}: seeds are not chosen by validation; list them in the study's seeds")
    if path == "training.monitor":
        raise UserError(f"{where}.{path}: grid points are chosen by the monitored metric; set it in the experiment")
    if path == "model.name":
        raise UserError(f"{where}.{path}: another model is another experiment; add one to the study")
    if section == "training" and not experiment.model.trains:
        raise UserError(f"{where}.{path}: {experiment.model_name} is computed in closed form and does not train")
    valid = settings.model_fields.keys() - settings.runtime_fields
    if key in settings.runtime_fields:
        raise UserError(f"{where}.{path}: changes speed only, so validation cannot choose it")
    if key not in valid:
        raise UserError(
            f"{where}.{path}: unknown key of {experiment.model_name}{nearest(path, [f'{section}.{name}' for name in valid])}"
        )


def point_of(experiment: Experiment, values: Mapping[str, Any], where: str) -> Point:
    """Return an experiment with some of its settings changed, by key path such as model.gamma.

    Raises:
        UserError: the experiment cannot have these values.
    """
    changed: dict[str, Any] = {}
    for section in SECTIONS:
        before: Strict = getattr(experiment, section)
        own = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{section}.")}
        whole = {**before.model_dump(), **own}
        try:
            changed[section] = validate(type(before), whole, f"{where}.{section}")
        except UserError as error:
            raise UserError(str(error).replace(repr(whole), repr(own))) from None
    chosen = replace(experiment, **changed)
    check(chosen, where)
    taken = {section: changed[section].model_dump(mode="json") for section in SECTIONS}
    return Point({path: taken[path.partition(".")[0]][path.partition(".")[2]] for path in values}, chosen)


def _metrics(
    given: Sequence[str] | None, experiments: Mapping[str, Experiment], where: str, faults: list[str]
) -> list[str]:
    evaluations = [experiment.evaluation for experiment in experiments.values()]
    shared = {k for k in evaluations[0].ks if all(k in other.ks and k <= other.top_n for other in evaluations)}
    if not shared:
        faults.append(f"{where}.experiments: they have no common cut-off in evaluation.ks up to evaluation.top_n")
    if given is None:
        # The first metric is the main one: at the cut-off that training monitors, if it is among them.
        monitored = {int(experiment.training.monitor.partition("@")[2]) for experiment in experiments.values()}
        return [
            f"{name}@{k}" for k in sorted(shared, key=lambda k: (k not in monitored, -k)) for name in DEFAULT_METRICS
        ]
    valid = [f"{name}@{k}" for k in sorted(shared) for name in METRICS]
    for metric in given:
        if metric not in valid:
            faults.append(f"{where}.metrics = {metric!r}: not a metric of all its experiments{nearest(metric, valid)}")
    return list(given)
