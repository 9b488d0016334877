"""Outcomes of trials: scores from the files that training leaves, and whether the pruner would have ended the trial.

The outcome is decided from the scores of each epoch alone. A run that was finished before, for a grid or an earlier search,
therefore has the same outcome as one that the search ended early.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.training.pruning import Finished, Judge, Pruner, Report, scores_of


@dataclass(frozen=True)
class Outcome:
    """A finished trial, its training time, and why it failed or was ended."""

    finished: Finished
    seconds: float
    reason: str | None = None


def read_outcome(
    folder: Path, report: Path, monitor: str, pruner: Pruner, earlier: Sequence[Finished], number: int
) -> Outcome | None:
    """Return the outcome of a trial; None if its run has neither finished nor been ended by the search.

    Args:
        folder: of the run.
        report: file that a run leaves if the search ends it or its loss is not finite.
        monitor: the validation metric.
        pruner: ends trials early.
        earlier: finished trials of earlier batches.
        number: of the trial.
    """
    if (folder / "train.stage.json").is_file():
        return _of_run(folder, monitor, Judge(pruner, earlier, number))
    if not report.is_file():
        return None
    left = Report.model_validate(read_json(report), strict=False)
    if left.state == "failed":
        return Outcome(Finished(state="failed", epochs=left.epochs), left.seconds, left.reason)
    epoch = Judge(pruner, earlier, number).epoch(left.epochs)
    return None if epoch is None else _ended(left.epochs, epoch, left.seconds)


def _of_run(folder: Path, monitor: str, judge: Judge) -> Outcome:
    record: dict[str, Any] = read_json(folder / "train.stage.json")
    score, seconds = record.get("best_valid"), float(record.get("wall_seconds") or 0)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(
            f"{folder}: has no validation score (best_valid is {score!r}); give the dataset a validation split"
        )
    history = folder / "history.csv"
    scores: dict[int, float] = {}
    if history.is_file():
        with history.open(newline="", encoding="utf-8") as file:
            scores = scores_of(list(csv.DictReader(file)), monitor)
    epoch = judge.epoch(scores)
    # Training ends before the pruner is asked about its last epoch.
    if epoch is not None and epoch < record.get("epochs", 0):
        return _ended(scores, epoch, seconds)
    return Outcome(Finished(state="complete", score=float(score), epochs=scores), seconds)


def _ended(scores: dict[int, float], epoch: int, seconds: float) -> Outcome:
    until = {at: score for at, score in scores.items() if at <= epoch}
    finished = Finished(state="pruned", score=max(until.values()), epochs=until)
    return Outcome(finished, seconds, f"pruned after epoch {epoch}")
