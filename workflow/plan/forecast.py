"""Forecast of a run: what it downloads, how many images it fetches, and how long its extractors take on this machine.

Figures come from the configuration and, for the sizes of published files, from the headers of their servers: nothing is
fetched, and no model is loaded.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.gpus import gpu_here
from extractors.runtime.cpu_estimate import LARGE, check_cpu_hours
from extractors.spec import BackendSpec
from workflow.plan.config import Config
from workflow.plan.features import encoder_of
from workflow.plan.resources import Needs

USUAL_THREADS = 8
"""CPU threads that the rates of `extractors.spec.Cost` are measured with."""
UNKNOWN_ITEMS = 1000
"""Items of a dataset whose number neither a table nor the configuration states, for the check of large models."""
LEAST_HOURS = 0.05
"""Shorter jobs are not mentioned."""
SERVER = "use a server that has one (backend: openai-caption, see docs/captions.md), "
WEIGHT_BYTES = 2
"""Bytes of a parameter in the published files of a large model."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that will run: its rule and its wildcards by name."""

    rule: str
    wildcards: Mapping[str, str]


@dataclass
class Forecast:
    """What the jobs of a run need.

    Attributes:
        lines: for the user, one a fact.
        refused: reasons against the run on this machine.
    """

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def described(self, refusals: bool) -> list[str]:
        """Return the lines, with the refusals for a dry run; a run ends with them."""
        return [*self.lines, *(f"would be refused here: {reason}" for reason in self.refused if refusals)]


def known_sizes(files: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Return the sizes that the configuration states, in bytes."""
    return [file["size"] for file in files]


def forecast(
    config: Config,
    jobs: Iterable[PlannedJob],
    gpu: bool | None = None,
    sizes: Callable[[Sequence[Mapping[str, Any]]], list[int | None]] = known_sizes,
) -> Forecast:
    """Return what jobs download and how long their extractors take.

    Args:
        config: the configuration.
        jobs: the jobs that will run.
        gpu: the machine of the jobs has a GPU; by default, whether this one has.
        sizes: returns the sizes of published files in bytes, None where one is unknown.
    """
    gpu = gpu_here() if gpu is None else gpu
    found = Forecast()
    files: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    for job in jobs:
        if job.rule == "download":
            files += _published(config, job.wildcards["dataset"], job.wildcards["file"])
        elif job.rule == "images":
            found.lines += _images(config, job.wildcards["dataset"])
        elif job.rule in ("extract", "caption"):
            name = job.wildcards["extractor"]
            runs = encoder_of(config, name) or name if job.rule == "extract" else name
            spec = config.extractors[runs]
            models |= _weights(spec)
            items = known_items(config, job.wildcards["dataset"])
            if not gpu and spec.named_parameters() >= LARGE:
                _check_large(found, job, items, spec)
            else:
                found.lines += _hours(f"{job.rule} {job.wildcards['dataset']} {name}", items, spec, gpu)
    downloads = [f"weights of {model}{size}" for model, size in models.items()]
    if files:
        downloads.insert(0, _published_files(sizes(files)))
    if downloads:
        found.lines.insert(0, f"downloads, unless they are here already: {'; '.join(downloads)}")
    return found


def _published_files(sizes: Sequence[int | None]) -> str:
    """Return the number of published files with their size, such as "2 published files (1.2 GB)"."""
    known = [size for size in sizes if size is not None]
    total = sum(known) / 1e6
    parts = [f"{total / 1e3:.1f} GB" if total >= 1e3 else f"{max(total, 1):.0f} MB"] if known else []
    if unknown := len(sizes) - len(known):
        parts.append(f"{unknown} of unknown size" if known else "size unknown")
    return f"{len(sizes)} published file{'s' if len(sizes) > 1 else ''} ({' and '.join(parts)})"


def _published(config: Config, dataset: str, file: str) -> list[dict[str, Any]]:
    return [spec for spec in config.datasets[dataset].downloads(dataset).values() if spec["path"] == file]


def _images(config: Config, dataset: str) -> list[str]:
    if config.datasets[dataset].images_spec()["find"] != "urls":
        return []
    items = known_items(config, dataset)
    return [f"images of {dataset}: {f'about {items:,}' if items else 'one or more for each item'}, from the web"]


def _weights(spec: BackendSpec) -> dict[str, str]:
    """Return the hub repository of a model with the size of its weights, where the model's name states it."""
    repository = getattr(spec, "repository", None)
    if repository is None:
        return {}
    parameters = spec.named_parameters()
    return {repository: f" (about {WEIGHT_BYTES * parameters / 1e9:.0f} GB)" if parameters else ""}


def _hours(label: str, items: int | None, spec: BackendSpec, gpu: bool) -> list[str]:
    """Return the hours of a model by the rate that its backend is measured with."""
    if not items:
        return []
    threads = 1.0 if gpu and spec.uses_gpu() else min(os.cpu_count() or 1, USUAL_THREADS) / USUAL_THREADS
    hours = items / spec.cost.items_per_second / threads / 3600
    where = "with a small GPU" if gpu and spec.uses_gpu() else "on this CPU"
    return [f"{label}: at most about {hours:.1f} hours {where}"] if hours >= LEAST_HOURS else []


def _check_large(found: Forecast, job: PlannedJob, items: int | None, spec: BackendSpec) -> None:
    """Add the hours of a large model on this CPU, and why it does not start if that is too long without `allow_slow`."""
    parameters, name = spec.named_parameters(), job.wildcards["extractor"]
    hours = spec.cpu_hours(parameters, items or UNKNOWN_ITEMS)
    if hours is None:
        return
    if items:
        found.lines.append(f"{job.rule} {job.wildcards['dataset']} {name}: about {hours:,.1f} hours on this CPU")
    allowed = bool(getattr(spec, "allow_slow", False))
    try:
        check_cpu_hours(parameters, items or UNKNOWN_ITEMS, hours, allowed, SERVER if job.rule == "caption" else "")
    except UserError as error:
        found.refused.append(f"extractors.{name}: {error}")


def known_items(config: Config, dataset: str) -> int | None:
    """Return the number of items of a dataset: of its table, else as the configuration states it, else None."""
    if not Path(f"processed/{dataset}/items.parquet").is_file():
        return config.datasets[dataset].expected_counts().get("items")
    return Needs(config).items(dataset)
