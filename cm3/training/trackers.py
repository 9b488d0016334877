"""Experiment trackers: MLflow and Weights & Biases, through their own libraries, which are not among the requirements.

A tracker gets the settings of a run, the numbers of each epoch, and at the end the best score and the paths of the outputs.
One that fails during training is left out with a warning; training goes on.
"""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cm3.common.errors import UserError

log = logging.getLogger(__name__)

PROJECT = "cm3"
"""Name of the MLflow experiment and of the W&B project; CM3_TRACKING_PROJECT replaces it."""

LIBRARIES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""Distribution to install, by tracker."""


class Tracker(Protocol):
    """What a tracker does for one training run."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of an epoch, a row of the history."""

    def finish(self, facts: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        """Add the facts of a finished run and the paths of its outputs, and close the run."""


class Mlflow:
    """A run in MLflow: in the folder mlruns, or at MLFLOW_TRACKING_URI. A resumed run is found by its folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = _library("mlflow")
        address = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").resolve().as_uri()
        self.client = mlflow.MlflowClient(tracking_uri=address)
        project = os.environ.get("CM3_TRACKING_PROJECT", PROJECT)
        found = self.client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self.client.create_experiment(project)
        name = folder.as_posix()
        runs = self.client.search_runs([experiment], f"tags.folder = '{name}' and attributes.status = 'RUNNING'")
        if runs:
            self.run = runs[0].info.run_id
            return
        self.run = self.client.create_run(experiment, tags={"folder": name}, run_name=name).info.run_id
        for key, value in flat(settings).items():
            self.client.log_param(self.run, key, value)

    def add(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`; @ in a name becomes _at_, because MLflow allows no other sign there."""
        for key, value in numbers(row).items():
            self.client.log_metric(self.run, key.replace("@", "_at_"), value, step=int(row["epoch"]))

    def finish(self, facts: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        """See `Tracker`."""
        for key, value in numbers(facts).items():
            self.client.log_metric(self.run, f"final.{key}".replace("@", "_at_"), value)
        for path in outputs:
            self.client.set_tag(self.run, f"output.{path.name}", path.as_posix())
        self.client.set_terminated(self.run)


class Wandb:
    """A run in Weights & Biases; WANDB_MODE=offline writes it to the folder wandb. A resumed run continues under its id."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.run = _library("wandb").init(
            project=os.environ.get("CM3_TRACKING_PROJECT", PROJECT),
            id=folder.as_posix().replace("/", "-"),
            name=folder.as_posix(),
            config=dict(settings),
            resume="allow",
        )

    def add(self, row: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.run.log(numbers(row), step=int(row["epoch"]))

    def finish(self, facts: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        """See `Tracker`."""
        self.run.summary.update({f"final/{key}": value for key, value in numbers(facts).items()})
        self.run.summary.update({f"output/{path.name}": path.as_posix() for path in outputs})
        self.run.finish()


KINDS: dict[str, type[Mlflow] | type[Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


class Trackers:
    """The trackers of one run, none by default."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the trackers.

        Args:
            names: mlflow, wandb.
            folder: of the run, which names it.
            settings: of modalities, model and training.

        Raises:
            UserError: a library is not installed.
        """
        self.trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self.trackers[name] = KINDS[name](folder, settings)
            except UserError:
                raise
            except Exception as error:
                log.warning("%s: cannot be reached, this run is not tracked there: %s", name, error)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of an epoch."""
        self._call("add", row)

    def finish(self, facts: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        """Add what is known at the end, and close the runs."""
        self._call("finish", facts, outputs)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                log.warning("%s: failed, the rest of this run is not tracked there: %s", name, error)
                del self.trackers[name]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row, without the epoch."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "epoch" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"training.trackers: {name} is not installed ({error}); pip install {LIBRARIES[name]}, or remove it from the list"
        ) from None
