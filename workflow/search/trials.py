"""Trials of one experiment: Optuna's samplers choose them in batches, a journal keeps the finished ones.

The trials of a batch depend on the finished trials of earlier batches and on the seed alone, not on which jobs ended first
or on whether the search was stopped in between. Each trial has a sampler of its own, seeded by its number; the trials of a
batch see each other as running (the constant liar of TPE).
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from cm3.common.errors import UserError
from cm3.common.keys import canonical_json, key_of
from cm3.training.pruning import Finished
from workflow.plan.searches import Range, SearchSection

log = logging.getLogger(__name__)

Values = dict[str, Any]
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Journal:
    """The finished trials of an experiment's search, in a file that a killed search goes on from."""

    def __init__(self, path: Path, name: str) -> None:
        """Open the journal, a new one if it does not exist. The caller holds a lock that allows one search at a time.

        What a killed search has left is removed: its lock, and a last line without an end.

        Raises:
            UserError: the file is not a journal of Optuna.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        try:
            _remove_unfinished_line(path)
            storage = JournalStorage(JournalFileBackend(str(path)))
            self.study = optuna.create_study(
                study_name=name, direction="maximize", storage=storage, load_if_exists=True
            )
        except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            raise UserError(
                f"{path}: not a readable journal of Optuna ({error}); delete it: finished runs stay, and the search repeats "
                "its trials from them"
            ) from None

    def trials(self) -> list[FrozenTrial]:
        """Return the finished trials in their order."""
        return list(self.study.get_trials(deepcopy=False))

    def add(self, trial: FrozenTrial) -> None:
        """Append a finished trial in one step."""
        self.study.add_trial(trial)

    def importance(self) -> dict[str, float]:
        """Return the importance of each setting (PED-ANOVA); empty if there are too few trials to tell."""
        with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator())
            return {name: float(value) for name, value in found.items()}
        return {}


def _remove_unfinished_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)


def distributions(space: Mapping[str, list[Any] | Range]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions of a space; values that are not scalars are chosen by their JSON."""
    found: dict[str, BaseDistribution] = {}
    for path in sorted(space):
        values = space[path]
        if isinstance(values, list):
            found[path] = CategoricalDistribution([canonical_json(value) for value in values])
        elif isinstance(values.low, int):
            found[path] = IntDistribution(values.low, int(values.high), log=values.log, step=int(values.step or 1))
        else:
            step = None if values.step is None else float(values.step)
            found[path] = FloatDistribution(values.low, float(values.high), log=values.log, step=step)
    return found


def sampler(section: SearchSection, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one trial."""
    seed = int(key_of([section.seed, number])[:8], 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if section.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if section.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def next_batch(
    section: SearchSection,
    space: Mapping[str, list[Any] | Range],
    own: Mapping[str, Any],
    earlier: Sequence[FrozenTrial],
    size: int,
) -> list[Values]:
    """Return the values of the next `size` trials, by key path.

    Args:
        section: sampler and seed.
        space: what is searched.
        own: the experiment's own settings, the first trial if they are in the space.
        earlier: all finished trials of earlier batches.
        size: number of trials.
    """
    wanted = distributions(space)
    study = optuna.create_study(direction="maximize", study_name="search")
    study.add_trials(list(earlier))
    chosen = []
    for number in range(len(earlier), len(earlier) + size):
        if number == 0 and _contains(space, own):
            study.enqueue_trial(encoded(space, own))
        study.sampler = sampler(section, number)
        chosen.append(decoded(space, study.ask(wanted).params))
    return chosen


def encoded(space: Mapping[str, list[Any] | Range], values: Mapping[str, Any]) -> Values:
    """Return values as Optuna gets them."""
    return {path: canonical_json(values[path]) if isinstance(space[path], list) else values[path] for path in space}


def decoded(space: Mapping[str, list[Any] | Range], parameters: Mapping[str, Any]) -> Values:
    """Return the values of Optuna's parameters."""
    found = {}
    for path, value in parameters.items():
        choices = space[path]
        by_json = {canonical_json(choice): choice for choice in choices} if isinstance(choices, list) else {}
        found[path] = by_json.get(value, value)
    return found


def finished_trial(
    space: Mapping[str, list[Any] | Range],
    values: Mapping[str, Any],
    outcome: Finished,
    facts: Mapping[str, Any],
) -> FrozenTrial:
    """Return a finished trial for the journal; `facts` are kept with it (run, seconds, reason)."""
    return create_trial(
        state=STATES[outcome.state],
        value=outcome.score,
        params=encoded(space, values),
        distributions=distributions(space),
        intermediate_values=dict(outcome.epochs),
        user_attrs={name: value for name, value in facts.items() if value is not None},
    )


def outcome_of(trial: FrozenTrial) -> Finished:
    """Return the outcome of a finished trial of the journal."""
    state = next(name for name, state in STATES.items() if state == trial.state)
    return Finished(state=state, score=trial.value, epochs=dict(trial.intermediate_values))  # type: ignore[arg-type]


def _contains(space: Mapping[str, list[Any] | Range], own: Mapping[str, Any]) -> bool:
    return all(_is_in(values, own[path]) for path, values in space.items())


def _is_in(values: list[Any] | Range, value: Any) -> bool:
    if isinstance(values, list):
        return value in values
    if not isinstance(value, int | float) or not values.low <= value <= values.high:
        return False
    return values.step is None or not (value - values.low) % values.step
