"""Searches: spaces of settings that a study searches by validation, their trials, and what the search has found so far.

`workflow.search` asks Optuna for trials and writes `results/{study}/search.json`; the plan of runs reads it. This module
imports no Optuna, because every job reads the configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.strict import Float, Strict, validate
from cm3.training.pruning import Pruner

Number = int | Float
Choices = Annotated[list[Any], Field(min_length=1)]
Check = Callable[[Mapping[str, Any]], Any]
"""Raises a UserError for values that an experiment cannot have, by key path."""


class Range(Strict):
    """An interval of numbers to search, both ends included."""

    low: Number = Field(description="smallest value")
    high: Number = Field(description="largest value")
    log: bool = Field(False, description="search the logarithm: for values over orders of magnitude, such as rates")
    step: Number | None = Field(None, description="distance between values; null: every number")

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} has no logarithm; give a number above 0, or log: false")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step {self.step} is not above 0")
        return self


class SearchSection(Strict):
    """Settings that a study searches by validation instead of a grid (`./run search STUDY`)."""

    spaces: dict[str, dict[str, Choices | Range]] = Field(
        min_length=1,
        description="experiment -> key -> list of values, or {low: ..., high: ..., log: true}, such as model.gamma: {low: 0.1, "
        "high: 2}",
    )
    trials: int | None = Field(None, gt=0, description="budget of each experiment, in training runs")
    hours: Float | None = Field(
        None,
        gt=0,
        description="budget of each experiment, in hours of training; the search ends with the batch that uses it up",
    )
    batch: int = Field(
        4,
        gt=0,
        description="trials that are chosen together and may run at the same time; larger: faster, but less informed",
    )
    sampler: Literal["tpe", "random", "gp"] = Field(
        "tpe",
        description="Optuna's sampler: tree-structured Parzen estimator, random, or Gaussian process",
    )
    pruner: Pruner = Field(Pruner(), description="ends runs early that are worse than earlier ones")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of the sampler")
    finalists: int = Field(
        1,
        gt=0,
        description="best trials of each experiment that are trained with all seeds of the study and compared by validation",
    )

    def budget_used(self, trials: Sequence["TrialState"]) -> bool:
        """Return whether finished trials of one experiment use up the budget."""
        seconds = sum(trial.seconds or 0 for trial in trials)
        by_number = self.trials is not None and len(trials) >= self.trials
        return by_number or (self.hours is not None and seconds >= 3600 * self.hours)

    @model_validator(mode="after")
    def _some_budget(self) -> "SearchSection":
        if self.trials is None and self.hours is None:
            raise ValueError("give a budget: trials, hours or both")
        for name, space in self.spaces.items():
            if not space:
                raise ValueError(f"spaces.{name} is empty; name a setting, or leave the experiment out")
        return self


class TrialState(Strict):
    """One trial in search.json.

    Attributes:
        values: by key path.
        run: key of the run, in results/{experiment}/runs/.
        score: validation score; of a pruned trial, that of the epoch at which it was ended.
        epochs: epochs trained.
    """

    number: int
    state: Literal["running", "complete", "pruned", "failed"]
    values: dict[str, Any]
    run: str = ""
    score: float | None = None
    epochs: int | None = None
    seconds: float | None = None
    reason: str | None = None


class ExperimentState(Strict):
    """What a search has found for one experiment.

    Attributes:
        key: of all that determines the trials; with another one, the trials are of an earlier configuration.
        finished: the budget is used up.
        importance: share of the variation of the score that each setting explains (PED-ANOVA).
    """

    key: str
    finished: bool
    monitor: str
    trials: list[TrialState] = Field(default_factory=list)
    importance: dict[str, float] = Field(default_factory=dict)

    def best(self, count: int) -> list[TrialState]:
        """Return the complete trials of the highest scores, at most `count` with different values; ties: the earlier one."""
        ranked = sorted(
            (t for t in self.trials if t.state == "complete" and t.score is not None),
            key=lambda trial: (-(trial.score or 0), trial.number),
        )
        found: list[TrialState] = []
        for trial in ranked:
            if len(found) < count and all(trial.values != other.values for other in found):
                found.append(trial)
        return found


@dataclass(frozen=True)
class Search:
    """A checked search of a study: its settings, its spaces with the type of each number, and its state by experiment."""

    section: SearchSection
    spaces: Mapping[str, Mapping[str, list[Any] | Range]]
    states: Mapping[str, ExperimentState] = field(default_factory=dict)


def state_path(study: str) -> Path:
    """Return the file with the trials of a study's search."""
    return Path(f"results/{study}/search.json")


def read_states(study: str) -> dict[str, ExperimentState]:
    """Return the state of a study's search by experiment; empty before its first trial, or if the file is not readable.

    `./run search` writes the file again from its journals.
    """
    path = state_path(study)
    if not path.is_file():
        return {}
    try:
        stored = read_json(path)["experiments"]
        return {name: ExperimentState.model_validate(state, strict=False) for name, state in stored.items()}
    except (UserError, KeyError, TypeError, AttributeError, ValueError):
        return {}


def parse_space(space: Mapping[str, list[Any] | Range], check: Check, where: str) -> dict[str, list[Any] | Range]:
    """Return a space whose values and ends are valid; the ends of a range are whole numbers only if the setting is one.

    Raises:
        UserError: one line for each value that the experiment cannot have.
    """
    parsed: dict[str, list[Any] | Range] = {}
    faults: dict[str, None] = {}
    for path, values in space.items():
        wanted = values if isinstance(values, list) else [values.low, values.high]
        for value in wanted:
            try:
                check({path: value})
            except UserError as error:
                faults |= dict.fromkeys(str(error).splitlines())
        if isinstance(values, list):
            if any(values.count(value) > 1 for value in values):
                faults[f"{where}.{path}: duplicate value"] = None
            parsed[path] = values
        else:
            parsed[path] = _typed(values, path, check, f"{where}.{path}", faults)
    if faults:
        raise UserError("\n".join(faults))
    return parsed


def _typed(values: Range, path: str, check: Check, where: str, faults: dict[str, None]) -> Range:
    ends = [values.low, values.high, values.step or 1]
    try:
        check({path: (values.low + values.high) / 2 + 0.123456789 * (values.high - values.low)})
        whole = False
    except UserError:
        whole = True
    if whole and not all(float(end).is_integer() for end in ends):
        faults[f"{where}: the setting is a whole number, the range {values.low} to {values.high} is not"] = None
        return values
    kind: type = int if whole else float
    typed = {"low": kind(values.low), "high": kind(values.high), "log": values.log}
    return validate(Range, typed | {"step": None if values.step is None else kind(values.step)}, where)
