"""Memory and time that a job asks a cluster for, from the size of its inputs and from the model that it runs.

Estimates are made when a job is submitted. A file that is not there yet, because a job before it in the same group
makes it, is judged by the counts that the configuration expects. The figures behind the constants stand in
benchmarks/RESULTS.md; the estimates are two to three times those, and a job that still runs out is submitted again with
more. Nothing here changes what a job computes, and nothing is limited by it where jobs run on this machine.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow.plan.runs import Plan

Files = Mapping[str, str]
"""A job's input files by name, as its rule has them."""

LONGEST_MINUTES = 24 * 60
"""What is asked for at first at most. Stages that take longer keep what they have, and go on at the next attempt."""

MEBIBYTE = 1e6
_PARAMETERS = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[bB](?![A-Za-z])")

# Of a backend: memory in MB without its weights, memory in MB of its weights where they are not at hand, and items a
# second of 8 threads or, where a processor is too slow to be used, of a small GPU.
_BACKENDS: dict[str, tuple[float, float, float]] = {
    "descriptor": (1000, 0, 50),
    "precomputed": (1500, 0, 500),
    "sentence-transformers": (2500, 1500, 30),
    "transformers-text": (2500, 4000, 10),
    "timm": (2500, 1500, 20),
    "open_clip": (2500, 3000, 20),
    "transformers-vision": (2500, 3000, 20),
    "transformers-mllm": (6000, 32000, 1),
    "transformers-caption": (6000, 32000, 0.2),
    "vllm-caption": (8000, 32000, 2),
    "openai-caption": (1500, 0, 1),
}
_UNKNOWN_BACKEND = (6000, 8000, 1)


@dataclass(frozen=True)
class Need:
    """What one job needs: `mem_mb` in MB (10^6 bytes), `minutes` of wall time."""

    mem_mb: float
    minutes: float

    def for_attempt(self, attempt: int) -> "Need":
        """Return what to ask for at the n-th attempt: n times the estimate, which is rounded up to 100 MB and minutes."""
        minutes = math.ceil(min(self.minutes, LONGEST_MINUTES))
        return Need(attempt * 100 * math.ceil(self.mem_mb / 100), attempt * minutes)


@dataclass(frozen=True)
class Shape:
    """Rows and vector width of a table; the width is 0 where it holds no vectors."""

    rows: int
    dim: int = 0

    @property
    def megabytes(self) -> float:
        """Size of the vectors as float32."""
        return self.rows * self.dim * 4 / MEBIBYTE


class Needs:
    """What each stage needs, by name, for a plan's configuration.

    Attributes:
        estimates: stage -> function of the rule's wildcards and its input files.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.estimates: dict[str, Callable[[Any, Files], Need]] = {
            "generate": lambda wildcards, files: Need(2000, 30),
            "download": lambda wildcards, files: Need(1000, 720),
            "prepare": self.prepare,
            "split": self.split,
            "images": self.images,
            "extract": self.extract,
            "caption": self.extract,
            "control": self.control,
            "similarity": self.similarity,
            "train": self.train,
            "evaluate": self.evaluate,
            "publish": self.publish,
            "compare": self.compare,
            "light": self.light,
        }

    def mem_mb(self, stage: str) -> Callable[..., int]:
        """Return the function that a rule gives as its `mem_mb`."""
        return lambda wildcards, input, attempt: int(self._of(stage, wildcards, input, attempt).mem_mb)

    def runtime(self, stage: str) -> Callable[..., int]:
        """Return the function that a rule gives as its `runtime`, in minutes."""
        return lambda wildcards, input, attempt: int(self._of(stage, wildcards, input, attempt).minutes)

    def _of(self, stage: str, wildcards: Any, input: Any, attempt: int) -> Need:
        files = {name.rstrip("_"): str(path) for name, path in input.items()}
        return self.estimates[stage](wildcards, files).for_attempt(attempt)

    def prepare(self, wildcards: Any, files: Files) -> Need:
        """The source's own estimate, from the sizes of its files."""
        return Need(*self.plan.dataset(wildcards.dataset).prepare_estimate(files))

    def split(self, wildcards: Any, files: Files) -> Need:
        """Five columns and their sorted copies: 200 bytes an interaction."""
        rows = self._interactions(wildcards, files)
        return Need(1000 + rows * 200 / MEBIBYTE, 10 + rows / 2e6)

    def images(self, wildcards: Any, files: Files) -> Need:
        """Memory does not grow with the number of images; time is what a polite client takes, twice over."""
        dataset = self.plan.dataset(wildcards.dataset)
        rate = dataset.images_runtime().get("rate", 300.0)
        return Need(1500, 30 + 2 * self._items(wildcards, files).rows / min(rate, 300.0) / 60)

    def extract(self, wildcards: Any, files: Files) -> Need:
        """The model's weights and what the library takes; captions are encoded by their text model."""
        name = wildcards.extractor
        spec = self.plan.config.extractors[name]
        if "captions" in files:
            spec = self.plan.config.extractors[self.plan.encoder(name) or name]
        base, weights, rate = _BACKENDS.get(spec.backend, _UNKNOWN_BACKEND)
        weights = _weights_mb(spec) or weights
        items = self._items(wildcards, files).rows
        # Published vectors of a whole category are read through, and the items' own kept.
        kept = items * 4096 * 4 / MEBIBYTE if spec.backend == "precomputed" else 0
        return Need(base + weights + 2 * kept + items / 100, 20 + items / rate / 60)

    def control(self, wildcards: Any, files: Files) -> Need:
        """One matrix of features and the one that stands for it."""
        return Need(1000 + 4 * self._vectors(files, "features", wildcards).megabytes, 15)

    def similarity(self, wildcards: Any, files: Files) -> Need:
        """The features, their unit copies, one block of scores; the time is quadratic in the items."""
        shape = self._vectors(files, "features", wildcards)
        return Need(1500 + 2.5 * shape.megabytes, 10 + shape.rows**2 * shape.dim / 1e10 / 60)

    def train(self, wildcards: Any, files: Files) -> Need:
        """Features, tables of users and items with gradients and Adam's moments, the graph; time by epochs and steps.

        A closed form takes half an hour at most, but for EASE, whose time is cubic in the items.
        """
        experiment = self.plan.config.experiments[wildcards.experiment]
        interactions = self._interactions(wildcards, files)
        users, items = self._users(wildcards, files), self._items(wildcards, files).rows
        features = [name for name in files if name.startswith("features")]
        shapes = [self._vectors(files, name, wildcards) for name in features]
        width = getattr(experiment.model, "embedding_dim", 64) * (len(features) + 1)
        tables = (users + items) * width * 4 / MEBIBYTE
        memory = 2500 + 2 * sum(shape.megabytes for shape in shapes) + 16 * tables + interactions * 100 / MEBIBYTE
        if not experiment.traits.trains:
            ease = experiment.model_name == "ease"
            return Need(memory + ease * 3 * items**2 * 8 / MEBIBYTE, 30 + ease * items**3 / 1e11 / 60)
        steps = interactions / experiment.training.batch_size + 1
        step_seconds = 2.2e-6 * interactions + 5e-9 * sum(shape.rows * shape.dim for shape in shapes) + 0.05
        return Need(memory, 30 + experiment.training.epochs * steps * step_seconds / 60)

    def evaluate(self, wildcards: Any, files: Files) -> Need:
        """Embeddings or item weights, a block of scores, some 100 ranked items a user; time by users times items."""
        users, items = self._users(wildcards, files), self._items(wildcards, files).rows
        dims = [_shape(path).dim for name, path in files.items() if name.endswith("embeddings") and Path(path).exists()]
        width = max(dims, default=256)
        tables = 4 * (users + items) * width * 4 / MEBIBYTE
        if "weights" in files:
            dense = self.plan.config.experiments[wildcards.experiment].model_name == "ease"
            tables = 1.5 * (_megabytes([files["weights"]]) or dense * items**2 * 4 / MEBIBYTE)
        rows = self._interactions(wildcards, files) * 100 + users * 6000
        return Need(2000 + tables + rows / MEBIBYTE, 15 + users * items / 1e9)

    def publish(self, wildcards: Any, files: Files) -> Need:
        """Copies, a block at a time."""
        return Need(1000, 15 + _megabytes(files.values()) / 50 / 60)

    def compare(self, wildcards: Any, files: Files) -> Need:
        """The lists of two cells at a time, and a column of users for each experiment and metric."""
        users, cells = self._users(wildcards, files), sum(name.startswith("per_user") for name in files)
        return Need(1500 + users * 0.015, 15 + users * cells / 1e6)

    def light(self, wildcards: Any, files: Files) -> Need:
        """Tables and pages: what is read, a few times over."""
        return Need(1500 + 4 * _megabytes(files.values()), 20)

    # Counts, from the files that are there, else from what the configuration expects

    def _interactions(self, wildcards: Any, files: Files) -> int:
        for name in ("interactions", "ratings"):
            if Path(files.get(name, "")).is_file():
                return _shape(files[name]).rows
        return self._expected(wildcards, "interactions", 2_000_000)

    def _users(self, wildcards: Any, files: Files) -> int:
        if Path(files.get("users", "")).is_file():
            return _shape(files["users"]).rows
        return self._expected(wildcards, "users", 200_000)

    def _items(self, wildcards: Any, files: Files) -> Shape:
        for path in (files.get("items", ""), f"processed/{self._dataset_name(wildcards)}/items.parquet"):
            if Path(path).is_file():
                return _shape(path)
        return Shape(self._expected(wildcards, "items", 100_000))

    def _vectors(self, files: Files, name: str, wildcards: Any) -> Shape:
        if Path(files.get(name, "")).is_file():
            return _shape(files[name])
        return Shape(self._items(wildcards, files).rows, 1024)

    def _expected(self, wildcards: Any, count: str, default: int) -> int:
        name = self._dataset_name(wildcards)
        dataset = self.plan.config.datasets.get(name) if name else None
        return dataset.expected_counts().get(count, default) if dataset else default

    def _dataset_name(self, wildcards: Any) -> str | None:
        named = getattr(wildcards, "dataset", None)
        experiment = self.plan.config.experiments.get(getattr(wildcards, "experiment", ""))
        return named or (experiment.dataset if experiment else None)


def _megabytes(paths: Iterable[str]) -> float:
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file()) / MEBIBYTE


def _shape(path: str) -> Shape:
    return _footer(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _footer(path: str, modified: int) -> Shape:
    # Loaded where a table is there to be read: planning a fresh data set needs none of it.
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    widths = [getattr(field.type, "list_size", 0) for field in file.schema_arrow]
    return Shape(file.metadata.num_rows, max(widths, default=0))


def _weights_mb(spec: Any) -> float:
    """Return what a model's weights take as float32 while they are loaded; 0 where nothing tells."""
    path = getattr(spec, "weights_path", None)
    if path is not None and path.exists():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return 2 * _megabytes(map(str, files))
    billions = _PARAMETERS.search(str(getattr(spec, "model", "") or ""))
    return 4000 * float(billions[1]) if billions else 0.0
