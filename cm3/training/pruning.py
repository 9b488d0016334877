"""Pruning: training runs of a search (`workflow.search`) that end early, because earlier trials were better at that epoch.

Optuna's pruners decide from finished trials of earlier batches alone, so that the decision does not depend on which jobs
run at the same time. A pruned run keeps its checkpoint and has no outputs: asked for by name, it goes on to its end.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.files import read_json, write_json
from cm3.common.strict import Float, Strict

if TYPE_CHECKING:
    import optuna

BATCH_VARIABLE = "CM3_SEARCH_BATCH"
"""Environment variable with the path of the `Batch` that the jobs of a search belong to."""

State = Literal["complete", "pruned", "failed"]


class PrunedError(UserError):
    """The search ended this run."""


class Pruner(Strict):
    """A pruner of Optuna and its settings."""

    name: Literal["none", "median", "percentile", "successive-halving"] = Field(
        default="median",
        description="none; median or percentile: end a run whose best score so far is below that share of the earlier "
        "runs' scores at the same epoch; successive-halving: let the best quarter go on at epochs 10, 40, 160",
    )
    startup_trials: int = Field(
        default=5, ge=0, description="finished runs before any is ended early (median, percentile)"
    )
    warmup_epochs: int = Field(
        default=10, ge=0, description="epochs that every run may train; the first rung of successive-halving"
    )
    percentile: Float = Field(default=25.0, ge=0, le=100, description="per cent of the runs that go on (percentile)")

    def of_optuna(self) -> "optuna.pruners.BasePruner":
        """Return the pruner of the library."""
        import optuna

        settings = {"n_startup_trials": self.startup_trials, "n_warmup_steps": self.warmup_epochs}
        if self.name == "median":
            return optuna.pruners.MedianPruner(**settings)
        if self.name == "percentile":
            return optuna.pruners.PercentilePruner(self.percentile, **settings)
        if self.name == "successive-halving":
            return optuna.pruners.SuccessiveHalvingPruner(max(1, self.warmup_epochs), 4)
        return optuna.pruners.NopPruner()


class Finished(Strict):
    """A finished trial: its state, its score, and the validation score of each epoch."""

    state: State
    score: float | None = None
    epochs: dict[int, float] = Field(default_factory=dict)


class Member(Strict):
    """A running trial of a batch: its number, and the file where a pruned or failed run leaves its scores."""

    experiment: str
    number: int
    report: str


class Batch(Strict):
    """The trials that run at the same time, by the folder of their run, and the finished trials of each experiment."""

    pruner: Pruner
    runs: dict[str, Member]
    earlier: dict[str, list[Finished]]


class Report(Strict):
    """What a run that has no outputs leaves: why it ended, the validation scores until then, and its time."""

    state: Literal["pruned", "failed"]
    reason: str
    epochs: dict[int, float]
    seconds: float


class Judge:
    """Decides at which epoch a trial is pruned. Equal trials before it and equal scores give the same epoch."""

    def __init__(self, pruner: Pruner, earlier: Sequence[Finished], number: int) -> None:
        """Take the finished trials of earlier batches, and the number of this trial."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(direction="maximize", study_name="search", pruner=pruner.of_optuna())
        self.passive = pruner.name == "none"
        for trial in earlier:
            self._repeat(trial, rungs=pruner.name == "successive-halving")
        for _ in range(number - len(earlier)):
            self.study.ask()  # trials of the same batch, which have no influence
        self.trial = self.study.ask()
        self.seen = 0
        self.found: int | None = None

    def _repeat(self, trial: Finished, rungs: bool) -> None:
        import optuna

        asked = self.study.ask()
        for epoch, value in trial.epochs.items():
            asked.report(value, epoch)
            if rungs:
                asked.should_prune()  # notes which rungs the trial has reached
        if trial.state == "failed":
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        elif trial.state == "pruned":
            self.study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(asked, trial.score)

    def epoch(self, scores: Mapping[int, float]) -> int | None:
        """Return the first epoch at which the trial is pruned, None if it goes on; later scores continue earlier ones."""
        for epoch, value in list(scores.items())[self.seen :]:
            if self.passive or self.found is not None:
                break
            self.trial.report(value, epoch)
            self.seen += 1
            if self.trial.should_prune():
                self.found = epoch
        return self.found


class Trial:
    """A training run that is a trial of a search."""

    def __init__(self, batch: Batch, member: Member) -> None:
        self.report_path = Path(member.report)
        self.started = time.monotonic()
        self.judge = Judge(batch.pruner, batch.earlier[member.experiment], member.number)

    def is_pruned(self, scores: Mapping[int, float]) -> bool:
        """Return whether the pruner ends the run, given its validation scores by epoch."""
        return self.judge.epoch(scores) is not None

    def end_pruned(self, scores: Mapping[int, float], writes: bool) -> PrunedError:
        """Return the error that ends the run; `writes`: leave its report as well."""
        reason = f"pruned after epoch {self.judge.found}"
        if writes:
            self._report("pruned", reason, scores)
        return PrunedError(f"the search ended this run: {reason}; its checkpoint is kept")

    def report_failure(self, reason: str, scores: Mapping[int, float]) -> None:
        """Leave the report of a run whose loss is not finite."""
        self._report("failed", reason, scores)

    def _report(self, state: Literal["pruned", "failed"], reason: str, scores: Mapping[int, float]) -> None:
        seconds = time.monotonic() - self.started
        report = Report(state=state, reason=reason, epochs=dict(scores), seconds=seconds)
        write_json(self.report_path, report.model_dump(mode="json"))


def read_trial(folder: Path) -> Trial | None:
    """Return the trial that the run in `folder` is, None outside of a search.

    Raises:
        UserError: the file of the batch is missing or damaged.
    """
    path = os.environ.get(BATCH_VARIABLE)
    if not path:
        return None
    batch = Batch.model_validate(read_json(path), strict=False)
    member = batch.runs.get(folder.as_posix())
    return None if member is None else Trial(batch, member)


def scores_of(history: Sequence[Mapping[str, Any]], monitor: str) -> dict[int, float]:
    """Return the validation score of each epoch that has one, from the rows of a history."""
    column = f"valid_{monitor}"
    return {int(row["epoch"]): float(row[column]) for row in history if row.get(column) not in (None, "")}
