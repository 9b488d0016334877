"""The search of a study: asks for a batch of trials, lets the workflow run them, notes their scores, and repeats."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.training.pruning import BATCH_VARIABLE, Batch, Finished, Member
from workflow.plan.config import Config
from workflow.plan.runs import run_key, training_folder
from workflow.plan.searched import search_key
from workflow.plan.searches import ExperimentState, TrialState, state_path
from workflow.plan.studies import point_of
from workflow.search.outcomes import Outcome, read_outcome
from workflow.search.trials import Journal, Values, decoded, finished_trial, next_batch, outcome_of

log = logging.getLogger("workflow.search")

Asked = tuple[int, Values, str, Outcome | None]
"""Number, values, key of the run and outcome of a trial; None where the run has failed."""


class ExperimentSearch:
    """The search of one experiment of a study."""

    def __init__(self, config: Config, name: str, experiment: str) -> None:
        self.config, self.experiment = config, experiment
        self.study = config.studies[name]
        if self.study.search is None:
            raise UserError(f"studies.{name}: has no search; add one (docs/studies.md)")
        self.section, self.space = self.study.search.section, self.study.search.spaces[experiment]
        self.own = config.experiments[experiment]
        self.monitor = self.own.training.monitor
        self.key = search_key(config, name, experiment)
        self.folder = state_path(name).parent / "search"
        self.journal = Journal(self.folder / f"{experiment}-{self.key}.journal", f"{name}/{experiment}")
        self.asked: list[Values] = []

    def trials(self) -> list[FrozenTrial]:
        """Return the finished trials."""
        return self.journal.trials()

    def state(self) -> ExperimentState:
        """Return the trials so far, those of the running batch included."""
        finished = self.trials()
        states = [self._state(number, trial) for number, trial in enumerate(finished)]
        running = [
            TrialState(number=number, state="running", values=values, run=self.run_of(values))
            for number, values in enumerate(self.asked, self._first(finished))
            if number >= len(finished)
        ]
        done = not running and self.section.budget_used(states)
        return ExperimentState(
            key=self.key,
            finished=done,
            monitor=self.monitor,
            trials=[*states, *running],
            importance=self.journal.importance() if done else {},
        )

    def _state(self, number: int, trial: FrozenTrial) -> TrialState:
        values, outcome = decoded(self.space, trial.params), outcome_of(trial)
        return TrialState(
            number=number,
            state=outcome.state,
            values=values,
            score=outcome.score,
            epochs=max(outcome.epochs, default=None),
            **trial.user_attrs,
        )

    def _first(self, finished: Sequence[FrozenTrial]) -> int:
        """Return the number of the first trial of the batch that is not finished."""
        size = self.section.batch
        return (len(finished) - 1) // size * size if len(finished) % size else len(finished)

    def ask(self) -> bool:
        """Choose the trials of the next batch, or of the one that was interrupted; False if the budget is used up."""
        self.asked = []
        finished = self.trials()
        first = self._first(finished)
        states = [self._state(number, trial) for number, trial in enumerate(finished)]
        if first == len(finished) and self.section.budget_used(states):
            return False
        size = (
            self.section.batch if self.section.trials is None else min(self.section.batch, self.section.trials - first)
        )
        if size <= len(finished) - first:
            return False
        own = self._own_values()
        self.asked = next_batch(self.section, self.space, own, finished[:first], size)
        return True

    def _own_values(self) -> Values:
        sections: dict[str, Any] = {"model": self.own.model, "training": self.own.training}
        dumped = {name: section.model_dump(mode="json") for name, section in sections.items()}
        return {path: dumped[path.partition(".")[0]][path.partition(".")[2]] for path in self.space}

    def run_of(self, values: Values) -> str:
        """Return the key of the run of a trial; '' for values that exclude each other."""
        try:
            point = point_of(self.own, values, f"experiments.{self.experiment}")
        except UserError:
            return ""
        return run_key(self.config, point.experiment.with_seed(self.study.seeds[0]))

    def members(self) -> list[tuple[int, Values, str]]:
        """Return (number, values, run) of the trials of the batch that are not finished."""
        finished = self.trials()
        first = self._first(finished)
        return [
            (number, values, self.run_of(values))
            for number, values in enumerate(self.asked, first)
            if number >= len(finished)
        ]

    def earlier(self) -> list[Finished]:
        """Return the finished trials of earlier batches."""
        finished = self.trials()
        return [outcome_of(trial) for trial in finished[: self._first(finished)]]

    def run_folder(self, run: str) -> Path:
        """Return the folder that a run is trained in."""
        return Path(training_folder(self.config, self.experiment, run))

    def report(self, run: str) -> Path:
        """Return the file that a run leaves which the search ends."""
        return self.folder / f"{self.experiment}-{run}.json"

    def outcomes(self) -> list[Asked]:
        """Return the outcome of each trial of the batch; None where its run has failed."""
        earlier, found = self.earlier(), []
        for number, values, run in self.members():
            if not run:
                reason = "these values exclude each other"
                outcome: Outcome | None = Outcome(Finished(state="failed"), 0.0, reason)
            else:
                where = (self.run_folder(run), self.report(run))
                outcome = read_outcome(*where, self.monitor, self.section.pruner, earlier, number)
            found.append((number, values, run, outcome))
        return found

    def note(self, outcomes: Sequence[Asked]) -> None:
        """Write the outcomes of the batch to the journal, in order."""
        for number, values, run, outcome in outcomes:
            if outcome is None:
                raise ValueError(f"trial {number} has no outcome")
            facts = {"run": run, "seconds": outcome.seconds, "reason": outcome.reason}
            self.journal.add(finished_trial(self.space, values, outcome.finished, facts))
            score = "" if outcome.finished.score is None else f"{self.monitor} {outcome.finished.score:.4f}, "
            log.info(
                "%s, trial %d: %s%s (%s)",
                *(self.experiment, number, score, _described(values), outcome.reason or "complete"),
            )
        self.asked = []


def search(config: Config, name: str, options: Sequence[str]) -> dict[str, ExperimentState]:
    """Search the settings of a study until the budget of each experiment is used up, and return what was found.

    Args:
        config: the configuration.
        name: of the study.
        options: for each call of snakemake.

    Raises:
        UserError: the study has no search, or a run failed; the message names its log.
    """
    if name not in config.studies:
        raise UserError(f"studies.{name}: no such study; there are: {', '.join(config.studies) or 'none'}")
    study = config.studies[name]
    if study.search is None:
        raise UserError(f"studies.{name}: has no search; add one (docs/studies.md)")
    searches = [ExperimentSearch(config, name, experiment) for experiment in study.search.spaces]
    while asked := [one for one in searches if one.ask()]:
        write_state(name, searches)
        run_batch(name, asked, options)
        outcomes = [one.outcomes() for one in asked]
        check_outcomes(outcomes, name)
        for one, found in zip(asked, outcomes, strict=True):
            one.note(found)
    return write_state(name, searches)


def write_state(name: str, searches: Sequence[ExperimentSearch]) -> dict[str, ExperimentState]:
    """Write search.json, from which the workflow knows the runs of the trials."""
    states = {one.experiment: one.state() for one in searches}
    stored = {experiment: state.model_dump(mode="json") for experiment, state in states.items()}
    write_json(state_path(name), {"study": name, "experiments": stored})
    return states


def run_batch(name: str, searches: Sequence[ExperimentSearch], options: Sequence[str]) -> None:
    """Let the workflow train the trials of a batch."""
    runs: dict[str, Member] = {}
    targets: list[str] = []
    for one in searches:
        for number, _, run in one.members():
            if run:
                one.report(run).unlink(missing_ok=True)
                report = one.report(run).as_posix()
                member = Member(experiment=one.experiment, number=number, report=report)
                # Equal trials of a batch have one run; the first one's number counts.
                runs.setdefault(one.run_folder(run).as_posix(), member)
                targets.append(f"{one.run_folder(run)}/train.stage.json")
    batch = Batch(
        pruner=searches[0].section.pruner, runs=runs, earlier={one.experiment: one.earlier() for one in searches}
    )
    path = searches[0].folder / "batch.json"
    write_json(path, batch.model_dump(mode="json"))
    for one in searches:
        numbers = [number for number, *_ in one.members()]
        log.info("%s: trials %d to %d; log: %s", one.experiment, numbers[0], numbers[-1], log_of(name))
    if targets:
        snakemake(list(dict.fromkeys(targets)), options, path, log_of(name))


def check_outcomes(outcomes: Sequence[Sequence[Asked]], name: str) -> None:
    """Raise a UserError if a run has neither finished nor been ended by the search, nor failed because of its loss."""
    lost = [run for found in outcomes for _, _, run, outcome in found if outcome is None]
    if lost:
        raise UserError(
            f"{len(lost)} runs of the search failed (first: {lost[0]}); {log_of(name)} says why. The same command goes on"
        )


def log_of(name: str) -> Path:
    """Return the log of the search of a study."""
    return Path(f"logs/{name}/search.log")


def snakemake(targets: Sequence[str], options: Sequence[str], batch: Path, printed: Path) -> int:
    """Run snakemake for the targets with the batch's file in the environment of its jobs, and return its status."""
    printed.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--keep-going", *options, "--", *targets]
    with printed.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | {BATCH_VARIABLE: batch.as_posix()},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )
        with _stopping(process):
            return process.wait()


def _end_with_parent() -> None:
    """Make the kernel of Linux end this process when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop the process when this one is asked to stop, and wait for it."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _described(values: Values) -> str:
    return ", ".join(
        f"{path} = {value:.4g}" if isinstance(value, float) else f"{path} = {value}" for path, value in values.items()
    )
