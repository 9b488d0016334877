"""The plan of data: what is made of a dataset and of its features, whatever experiment reads them."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from cm3.common.paths import expand
from cm3.datasets.registry import IMAGE_SOURCES
from cm3.datasets.spec import SourceSpec
from workflow.plan.config import Config
from workflow.plan.digest import code_digest
from workflow.plan.folder import digest_of_folder
from workflow.plan.models import ModelSettings


@dataclass(frozen=True)
class Task:
    """What a stage is told, and what of it decides its output.

    Attributes:
        spec: the stage's settings.
        code: digest of the code that it runs.
        runtime: settings that change speed or place only, and rerun nothing.
        decides: what in place of `spec` decides the output, where the spec holds more than that.
    """

    spec: dict[str, Any]
    code: str
    runtime: dict[str, Any] = field(default_factory=dict)
    decides: Any = None

    @property
    def identity(self) -> str:
        """What Snakemake records and compares: short, so that its reason for a rerun can be read."""
        return f"settings {key_of(self.spec if self.decides is None else self.decides)}, code {self.code}"


class DataPlan:
    """Tasks, paths and keys of datasets, extractors, controls and item graphs. Every method is cheap and deterministic.

    Args:
        config: the checked configuration.
        root: the repository's root, whose code the digests cover.
    """

    def __init__(self, config: Config, root: Path) -> None:
        self.config = config
        self.root = root
        # Asked for once per job by Snakemake, and each answer reads files or hashes settings.
        self.code = functools.cache(self._code)
        self.identity = functools.cache(self._identity)

    # Datasets

    def dataset(self, name: str) -> SourceSpec:
        """Return one dataset's settings."""
        return self.config.datasets[name]

    def generated(self) -> list[str]:
        """Return the names of datasets that are drawn by our generator."""
        return [name for name, dataset in self.config.datasets.items() if dataset.generate_spec() is not None]

    def generate(self, name: str) -> Task:
        """Return the task of drawing one of the datasets of `generated`."""
        return Task(self._generator(name), self.code("cm3.datasets.sample.generate"))

    def _generator(self, name: str) -> dict[str, Any]:
        dataset = self.dataset(name)
        spec = dataset.generate_spec()
        if spec is None:
            raise UserError(f"datasets.{name}: is of source {dataset.source!r} and is not generated")
        return spec

    def _source(self, name: str) -> dict[str, Any] | None:
        # Of data that come from elsewhere, Snakemake watches the files themselves.
        return self._generator(name) if name in self.generated() else None

    def downloaded(self) -> list[str]:
        """Return the names of datasets that have files to fetch."""
        return [name for name, dataset in self.config.datasets.items() if dataset.downloads(name)]

    def download(self, dataset: str, file: str) -> Task:
        """Return the task of fetching a raw file. Which of the published files it must be decides, not the mirror.

        Raises:
            UserError: the dataset has no such file.
        """
        files = self.dataset(dataset).downloads(dataset)
        path = f"raw/{dataset}/{file}"
        if path not in files:
            raise UserError(f"{path}: dataset {dataset!r} has no such file; it has {', '.join(files)}")
        expected = {name: value for name, value in files[path].items() if name != "urls"}
        # The code that fetches does not decide the bytes of a published file.
        return Task(files[path], "any", decides=expected)

    def prepare(self, dataset: str) -> Task:
        """Return the task of turning raw files into k-cored tables."""
        return Task(self.dataset(dataset).prepare_spec(), self._source_code(dataset, "prepare"))

    def split(self, dataset: str) -> Task:
        """Return the task of labelling interactions."""
        return Task(self.dataset(dataset).split_spec(), self.code("cm3.datasets.label"))

    def split_inputs(self, dataset: str) -> dict[str, str]:
        """Return the ratings, and where labels are kept the tables by whose ids they are found again.

        Raises:
            UserError: the earlier tables are not there, or are those that this preparation replaces.
        """
        base = f"processed/{dataset}"
        paths = {"ratings": f"{base}/ratings.parquet"}
        keep = self.dataset(dataset).split.keep
        if keep is None:
            return paths
        keep = expand(keep)
        if Path(keep).resolve().is_relative_to(Path(base).resolve()):
            raise UserError(
                f"datasets.{dataset}.split.keep = {keep!r}: lies in what this preparation replaces; copy its tables "
                "elsewhere and name the copy"
            )
        earlier = {f"keep.{name}": f"{keep}/{name}.parquet" for name in ("interactions", "items", "users")}
        # Snakemake takes an output whose inputs are missing for up to date.
        absent = [path for path in earlier.values() if not Path(path).is_file()]
        if absent:
            raise UserError(f"datasets.{dataset}.split.keep = {keep!r}: there is no {absent[0]}")
        return paths | {name: f"{base}/{name}.parquet" for name in ("items", "users")} | earlier

    def images(self, dataset: str) -> Task:
        """Return the task of gathering images; the contents of a user's own folder decide too."""
        chosen = self.dataset(dataset)
        folder = chosen.image_folder()
        digest = digest_of_folder(Path(folder)) if folder else None
        return Task(
            chosen.images_spec(),
            self._source_code(dataset, "images"),
            chosen.images_runtime(),
            decides=[chosen.images_spec(), digest],
        )

    def _source_code(self, dataset: str, stage: str) -> str:
        chosen = self.dataset(dataset)
        part = IMAGE_SOURCES[chosen.images_spec()["find"]] if stage == "images" else chosen.reader
        return self.code(f"cm3.datasets.{'images.stage' if stage == 'images' else stage}", part.partition(":")[0])

    # Extractors

    def _identity(self, extractor: str) -> dict[str, Any]:
        return self.config.extractors[extractor].identity()

    def encoder(self, extractor: str) -> str | None:
        """Return the text extractor that encodes this captioner's captions, None for other extractors."""
        return getattr(self.config.extractors[extractor], "encoder", None)

    def features_identity(self, extractor: str) -> dict[str, Any]:
        """Return what decides an extractor's features: weights by digest or revision, never by path."""
        encoder = self.encoder(extractor)
        if encoder is None:
            return self.identity(extractor)
        return {"caption": self.identity(extractor), "encoder": self.identity(encoder)}

    def features_path(self, dataset: str, extractor: str, key: str | None = None, control: str = "") -> str:
        """Return the path of an extractor's features, or of what stands in their place as a `control`.

        Raises:
            UserError: `key` is not that of the configured extractor.
        """
        expected = key_of(self.features_identity(extractor))
        _check_key(extractor, key, expected)
        modality = self.config.extractors[extractor].modality
        suffix = f"-{control}" if control else ""
        return f"processed/{dataset}/features/{modality}/{extractor}-{expected}{suffix}.parquet"

    def captions_path(self, dataset: str, extractor: str, key: str | None = None) -> str:
        """Return the path of a captioner's captions; their key does not depend on what encodes them.

        Raises:
            UserError: `key` is not that of the configured captioner.
        """
        expected = key_of(self.identity(extractor))
        _check_key(extractor, key, expected)
        return f"processed/{dataset}/captions/{extractor}-{expected}.parquet"

    def similarity_path(self, dataset: str, extractor: str, model: ModelSettings, control: str = "") -> str:
        """Return the path of the top-k item graph of an extractor's features; what is not the default ends its name."""
        stem = Path(self.features_path(dataset, extractor, control=control)).stem
        settings: Any = model
        method = "" if settings.knn_method == "exact" else f"-{settings.knn_method}"
        missing = "" if settings.knn_missing == "drop" else f"-{settings.knn_missing}"
        return f"processed/{dataset}/similarity/{stem}-k{settings.knn_k}{method}{missing}.parquet"

    def extract_inputs(self, dataset: str, extractor: str, key: str) -> dict[str, str]:
        """Return the named input files of an extraction."""
        self.features_path(dataset, extractor, key)
        if self.encoder(extractor) is not None:
            return {"items": f"processed/{dataset}/items.parquet", "captions": self.captions_path(dataset, extractor)}
        return self._item_inputs(dataset, extractor)

    def caption_inputs(self, dataset: str, extractor: str, key: str) -> dict[str, str]:
        """Return the named input files of captioning."""
        self.captions_path(dataset, extractor, key)
        return self._item_inputs(dataset, extractor)

    def _item_inputs(self, dataset: str, extractor: str) -> dict[str, str]:
        spec = self.config.extractors[extractor]
        paths = {"items": f"processed/{dataset}/items.parquet"}
        if "manifest" in spec.needs():
            paths["manifest"] = f"processed/{dataset}/images/manifest.parquet"
        if "vectors" in spec.needs():
            paths |= self._published_vectors(dataset, extractor)
        return paths

    def _published_vectors(self, dataset: str, extractor: str) -> dict[str, str]:
        modality = self.config.extractors[extractor].modality
        paths = self.dataset(dataset).published_vectors(dataset, modality)
        if not paths:
            raise UserError(
                f"extractors.{extractor}: takes the {modality} vectors published with a dataset, but "
                f"datasets.{dataset} (source {self.dataset(dataset).source}) has none; set path to a file of vectors"
            )
        return paths

    def extract(self, extractor: str) -> Task:
        """Return the task of an extraction: of captions, by their text encoder."""
        return self._extraction("extractors.extract", extractor, self.encoder(extractor) or extractor)

    def caption(self, extractor: str) -> Task:
        """Return the task of captioning."""
        return self._extraction("extractors.caption.stage", extractor, extractor)

    def _extraction(self, entry: str, name: str, extractor: str) -> Task:
        spec = self.config.extractors[extractor]
        identity = self.identity(extractor)
        # Settings and runtime hold paths of weights; the identity holds the weights' digest instead.
        told = {"name": name, "settings": spec.settings(), "identity": identity}
        return Task(told, self.code(entry, *spec.modules()), spec.runtime(), decides=[name, identity])

    def extract_gpus(self, extractor: str) -> int:
        """Return how many GPUs an extraction asks for: of captions, those of their text encoder."""
        return self._gpus(self.encoder(extractor) or extractor)

    def caption_gpus(self, extractor: str) -> int:
        """Return how many GPUs captioning asks for."""
        return self._gpus(extractor)

    def _gpus(self, extractor: str) -> int:
        spec = self.config.extractors[extractor]
        return getattr(spec, "tensor_parallel_size", 1) if spec.uses_gpu() else 0

    def control(self, modality: str, control: str) -> Task:
        """Return the task of replacing a modality's features; `control` is what follows the key in the file's name."""
        kind, _, seed = control.partition("-")
        spec = {"kind": kind, "seed": int(seed or 0), "modality": modality}
        return Task(spec, self.code("extractors.control"))

    def similarity(self, knn_k: int, variant: str = "") -> Task:
        """Return the task of finding each item's nearest items; `variant` is what follows k in the graph's name."""
        words = variant.split("-")
        method = next((word for word in ("hnsw", "ivf") if word in words), "exact")
        spec = {"knn_k": knn_k, "method": method, "missing": "mean" if "mean" in words else "drop"}
        # Loaded by name where it is wanted, so that exact graphs do not depend on it.
        modules = (
            ["cm3.similarity.stage"] if method == "exact" else ["cm3.similarity.stage", "cm3.similarity.approximate"]
        )
        return Task(spec, self.code(*modules))

    def similarity_gpus(self, dataset: str, extractor: str, variant: str) -> int:
        """Return how many GPUs finding each item's nearest items asks for.

        None where the search is approximate, or all models that read the graph are told to train on the processor.
        """
        readers = [
            experiment
            for experiment in self.config.experiments.values()
            if experiment.dataset == dataset
            and experiment.traits.graphs
            and extractor in experiment.modalities.values()
        ]
        on_cpu = readers and all(experiment.training.device == "cpu" for experiment in readers)
        approximate = {"hnsw", "ivf"} & set(variant.split("-"))
        return 0 if on_cpu or approximate else 1

    def _code(self, *modules: str) -> str:
        return code_digest(self.root, modules)


def _check_key(extractor: str, key: str | None, expected: str) -> None:
    if key not in (None, expected):
        raise UserError(
            f"{extractor}-{key}: the config's {extractor!r} has key {expected}; "
            "a file of other settings cannot be made from these"
        )
