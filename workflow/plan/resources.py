"""Memory and time that a job requests from a cluster, estimated from the size of its inputs and from its model.

Estimates are made when a job is submitted. Where a file does not exist yet, because an earlier job of the same group
makes it, the counts that the configuration expects are used. The measurements behind the constants are in
benchmarks/RESULTS.md; the estimates are two to three times as large, and a job that still runs out is submitted again
with more. Nothing here changes what a job computes, and jobs on this machine are not limited by it.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cm3.model_spec import MEGABYTE, Sizes
from cm3.training.schedule import batches_per_step
from workflow.plan.config import Config
from workflow.plan.features import encoder_of
from workflow.plan.shapes import Shape, shape_of

Files = Mapping[str, str]
"""Input files of a job by their names in its rule."""

LONGEST_MINUTES = int(os.environ.get("CM3_LONGEST_MINUTES", 24 * 60))
"""Largest request of any attempt. Stages that take longer store their progress and resume at the next attempt."""

USUAL_EPOCHS = 100
"""Epochs that a run is expected to take at most, because early stopping ends it."""

GPU_EVALUATION = 5e9
"""Number of users times items from which an evaluation runs on a GPU."""

SMALL_SEARCH = 1e10
"""Multiplications of a search of neighbours that one thread does in less time than its process takes to start."""


@dataclass(frozen=True)
class Need:
    """Memory in MB (10^6 bytes) and wall time in minutes of one job."""

    mem_mb: float
    minutes: float

    def for_attempt(self, attempt: int) -> "Need":
        """Return the request of the n-th attempt: n times the estimate, rounded up to 100 MB and whole minutes.

        The time is at most `LONGEST_MINUTES`, because a partition refuses a job that asks for more than it allows.
        """
        minutes = min(attempt * math.ceil(self.minutes), LONGEST_MINUTES)
        return Need(attempt * 100 * math.ceil(self.mem_mb / 100), minutes)


class Needs:
    """Estimates of what the jobs of each stage need, for one configuration.

    Attributes:
        estimates: stage -> function of the rule's wildcards and its input files.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.estimates: dict[str, Callable[[Any, Files], Need]] = {
            "generate": lambda wildcards, files: Need(2000, 30),
            "download": lambda wildcards, files: Need(1000, 720),
            "prepare": self.prepare,
            "split": self.split,
            "reviews": self.reviews,
            "user-groups": self.light,
            "images": self.images,
            "extract": self.extract,
            "caption": self.extract,
            "reduce": self.reduce,
            "control": self.control,
            "similarity": self.similarity,
            "train": self.train,
            "evaluate": self.evaluate,
            "publish": self.publish,
            "compare": self.compare,
            "light": self.light,
        }

    def mem_mb(self, stage: str) -> Callable[..., int]:
        """Return the function for `mem_mb` of a rule."""
        return lambda wildcards, input, attempt: int(self._of(stage, wildcards, input, attempt).mem_mb)

    def runtime(self, stage: str) -> Callable[..., int]:
        """Return the function for `runtime` of a rule, in minutes."""
        return lambda wildcards, input, attempt: int(self._of(stage, wildcards, input, attempt).minutes)

    def _of(self, stage: str, wildcards: Any, input: Any, attempt: int) -> Need:
        files = {name.rstrip("_"): str(path) for name, path in input.items()}
        return self.estimates[stage](wildcards, files).for_attempt(attempt)

    def prepare(self, wildcards: Any, files: Files) -> Need:
        """The source's own estimate, from the sizes of its files."""
        return Need(*self.config.datasets[wildcards.dataset].prepare_estimate(files))

    def split(self, wildcards: Any, files: Files) -> Need:
        """Five columns and their sorted copies: 200 bytes an interaction."""
        rows = self._interactions(wildcards, files)
        return Need(1000 + rows * 200 / MEGABYTE, 10 + rows / 2e6)

    def reviews(self, wildcards: Any, files: Files) -> Need:
        """The texts of all interactions, and their sorted copy; compressed files hold three times their size."""
        return Need(1500 + 9 * _megabytes(files.values()), 15 + _megabytes(files.values()) / 60)

    def images(self, wildcards: Any, files: Files) -> Need:
        """Memory does not grow with the number of images; time is what a polite client takes, twice over."""
        dataset = self.config.datasets[wildcards.dataset]
        rate = dataset.images_runtime().get("rate", 300.0)
        return Need(1500, 30 + 2 * self._items(wildcards, files).rows / min(rate, 300.0) / 60)

    def extract(self, wildcards: Any, files: Files) -> Need:
        """The model's weights and what the library takes; captions are encoded by their text model."""
        name = wildcards.extractor
        spec = self.config.extractors[name]
        if "captions" in files:
            spec = self.config.extractors[encoder_of(self.config, name) or name]
        items = self._items(wildcards, files).rows
        inputs = items * spec.inputs_per_item()
        return Need(spec.memory_mb(items), 20 + inputs / spec.cost.items_per_second / 60)

    def reduce(self, wildcards: Any, files: Files) -> Need:
        """The features, the reduced ones twice, the covariance matrix and its axes; cubic in the width, on one thread."""
        shape = self._vectors(files, "features", wildcards)
        work = shape.rows * shape.dim**2 + 10 * shape.dim**3
        return Need(1500 + 2.5 * shape.megabytes + 5 * 8 * shape.dim**2 / MEGABYTE, 15 + work / 1e10 / 60)

    def control(self, wildcards: Any, files: Files) -> Need:
        """The features and their replacement."""
        return Need(1000 + 4 * self._vectors(files, "features", wildcards).megabytes, 15)

    def similarity(self, wildcards: Any, files: Files) -> Need:
        """The features, their unit copies, one block of scores; the time is quadratic in the items, for ivf ^1.5."""
        shape = self._vectors(files, "features", wildcards)
        pairs = shape.rows**2
        if "ivf" in getattr(wildcards, "variant", "").split("-"):
            pairs = min(pairs, 64 * shape.rows**1.5)
        return Need(1500 + 2.5 * shape.megabytes, 10 + pairs * shape.dim / 1e10 / 60)

    def is_small_search(self, wildcards: Any, files: Files) -> bool:
        """Return whether one thread finds the neighbours in no time; they do not depend on the number of threads."""
        shape = self._vectors(files, "features", wildcards)
        return shape.rows**2 * shape.dim <= SMALL_SEARCH

    def train(self, wildcards: Any, files: Files) -> Need:
        """The estimate of the experiment's model, without Adam's moments where they are on disk."""
        experiment = self.config.experiments[wildcards.experiment]
        shapes = [self._vectors(files, name, wildcards) for name in files if name.startswith("features")]
        sizes = self._sizes(wildcards, files, features=[(shape.rows, shape.dim) for shape in shapes])
        training = experiment.training
        epochs = min(training.epochs, USUAL_EPOCHS)
        per_step = training.batch_size * batches_per_step(training, sizes.interactions)
        found = experiment.model.training_estimate(sizes, epochs=epochs, batch_size=per_step)
        on_disk = 2 * experiment.model.table_mb(sizes) if training.optimizer_state == "disk" else 0.0
        return Need(found.memory_mb - on_disk, found.minutes)

    def evaluate(self, wildcards: Any, files: Files) -> Need:
        """The estimate of the experiment's model."""
        sizes = self._sizes(wildcards, files)
        shapes = [shape_of(path) for name, path in files.items() if name.endswith("embeddings")]
        dim = max((shape.dim for shape in shapes if shape), default=0)
        exported = (sizes.users + sizes.items) * dim * 4 / MEGABYTE
        if "weights" in files:
            exported = _megabytes([files["weights"]])
        model = self.config.experiments[wildcards.experiment].model
        found = model.evaluation_estimate(replace(sizes, exported_mb=exported))
        return Need(found.memory_mb, found.minutes)

    def evaluation_gpu_percent(self, wildcards: Any, files: Files) -> int:
        """Return the share of a GPU that an evaluation takes: a quarter from `GPU_EVALUATION` scores on, or none.

        The CPU ranks fewer in less than a minute, in which a GPU can train.
        """
        experiment = self.config.experiments[wildcards.experiment]
        if experiment.training.device == "cpu":
            return 0
        scores = self._users(wildcards, files, unknown=0) * self._items(wildcards, files).rows
        return 25 if scores >= GPU_EVALUATION else 0

    def publish(self, wildcards: Any, files: Files) -> Need:
        """Copies, a block at a time, and the ids of users and items."""
        return Need(1000, 15 + _megabytes(files.values()) / 50 / 60)

    def compare(self, wildcards: Any, files: Files) -> Need:
        """Recommendations of two runs at a time, a column of users for each experiment and metric, and the features."""
        users, n_runs = self._users(wildcards, files), sum(name.startswith("per_user") for name in files)
        features = _megabytes(path for name, path in files.items() if name.startswith("features."))
        return Need(1500 + users * 0.015 + 2.5 * features, 15 + users * n_runs / 1e6)

    def light(self, wildcards: Any, files: Files) -> Need:
        """Tables and pages: a few times the size of the inputs."""
        return Need(1500 + 4 * _megabytes(files.values()), 20)

    def items(self, dataset: str) -> int:
        """Return the number of items of a dataset: of its table, otherwise as expected."""
        shape = shape_of(f"processed/{dataset}/items.parquet")
        return shape.rows if shape else self.config.datasets[dataset].expected_counts().get("items", 100_000)

    # Counts from existing files, otherwise from the expectations in the configuration

    def _sizes(self, wildcards: Any, files: Files, features: Sequence[tuple[int, int]] = ()) -> Sizes:
        users, items = self._users(wildcards, files), self._items(wildcards, files).rows
        return Sizes(users, items, self._interactions(wildcards, files), features)

    def _interactions(self, wildcards: Any, files: Files) -> int:
        for name in ("interactions", "ratings"):
            shape = shape_of(files.get(name))
            if shape:
                return shape.rows
        return self._expected(wildcards, "interactions", 2_000_000)

    def _users(self, wildcards: Any, files: Files, unknown: int = 200_000) -> int:
        shape = shape_of(files.get("users"))
        return shape.rows if shape else self._expected(wildcards, "users", unknown)

    def _items(self, wildcards: Any, files: Files) -> Shape:
        for path in (files.get("items"), f"processed/{self._dataset_name(wildcards)}/items.parquet"):
            shape = shape_of(path)
            if shape:
                return shape
        return Shape(self._expected(wildcards, "items", 100_000))

    def _vectors(self, files: Files, name: str, wildcards: Any) -> Shape:
        return shape_of(files.get(name)) or Shape(self._items(wildcards, files).rows, 1024)

    def _expected(self, wildcards: Any, count: str, default: int) -> int:
        name = self._dataset_name(wildcards)
        dataset = self.config.datasets.get(name) if name else None
        return dataset.expected_counts().get(count, default) if dataset else default

    def _dataset_name(self, wildcards: Any) -> str | None:
        named = getattr(wildcards, "dataset", None)
        experiment = self.config.experiments.get(getattr(wildcards, "experiment", ""))
        return named or (experiment.dataset if experiment else None)


def _megabytes(paths: Iterable[str]) -> float:
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file()) / MEGABYTE
