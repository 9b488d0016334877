"""The plan: which file each stage makes for a configuration, under which key, from which settings and code."""

import functools
from pathlib import Path
from typing import Any

from sources.config import Dataset, Sample
from stages.errors import UserError
from stages.keys import canonical_json as canonical
from stages.keys import key_of
from workflow.config import Config
from workflow.digest import code_digest
from workflow.folder import digest_of_folder

__all__ = ["Plan", "canonical"]


class Plan:
    """Paths, specs, keys and code digests by name. Every method is cheap and deterministic.

    What a `*_spec` or `*_identity` method returns decides a stage's output: a change there reruns the stage. What a
    `*_runtime` method returns changes speed or place only and reruns nothing.

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
        self.run = functools.cache(self._run)

    # Datasets

    def dataset(self, name: str) -> Dataset:
        """Return one dataset's settings."""
        return self.config.datasets[name]

    def generated(self) -> list[str]:
        """Return the names of datasets that are drawn by our generator."""
        return [name for name, dataset in self.config.datasets.items() if isinstance(dataset, Sample)]

    def generate_spec(self, name: str) -> dict[str, Any]:
        """Return the generator's settings for one of the datasets of `generated`."""
        dataset = self.dataset(name)
        if not isinstance(dataset, Sample):
            raise UserError(f"datasets.{name}: is of source {dataset.source!r} and is not generated")
        return dataset.sample_spec()

    def _source(self, name: str) -> dict[str, Any] | None:
        # Of data that come from elsewhere, Snakemake watches the files themselves.
        return self.generate_spec(name) if name in self.generated() else None

    def downloaded(self) -> list[str]:
        """Return the names of datasets that have files to fetch."""
        return [name for name, dataset in self.config.datasets.items() if dataset.downloads(name)]

    def download_spec(self, dataset: str, file: str) -> dict[str, Any]:
        """Return where a raw file comes from.

        Raises:
            UserError: the dataset has no such file.
        """
        files = self.dataset(dataset).downloads(dataset)
        path = f"raw/{dataset}/{file}"
        if path not in files:
            raise UserError(f"{path}: dataset {dataset!r} has no such file; it has {', '.join(files)}")
        return files[path]

    def download_expected(self, dataset: str, file: str) -> dict[str, Any]:
        """Return what a raw file must be, wherever it comes from."""
        return {name: value for name, value in self.download_spec(dataset, file).items() if name != "urls"}

    def source_code(self, dataset: str, stage: str) -> str:
        """Return the digest of the code that a stage of `sources` runs for this dataset."""
        return self.code(f"sources.{stage}", *self.dataset(dataset).modules().get(stage, []))

    def image_folder_digest(self, dataset: str) -> str | None:
        """Return a digest of the names and contents of a user's own picture folder, None for other sources."""
        folder = self.dataset(dataset).image_folder()
        return digest_of_folder(Path(folder)) if folder else None

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

    def features(self, dataset: str, extractor: str, key: str | None = None) -> str:
        """Return the path of an extractor's features.

        Raises:
            UserError: `key` is not that of the configured extractor.
        """
        expected = key_of(self.features_identity(extractor))
        _check_key(extractor, key, expected)
        modality = self.config.extractors[extractor].modality
        return f"processed/{dataset}/features/{modality}/{extractor}-{expected}.parquet"

    def captions(self, dataset: str, extractor: str, key: str | None = None) -> str:
        """Return the path of a captioner's captions; their key does not depend on what encodes them.

        Raises:
            UserError: `key` is not that of the configured captioner.
        """
        expected = key_of(self.identity(extractor))
        _check_key(extractor, key, expected)
        return f"processed/{dataset}/captions/{extractor}-{expected}.parquet"

    def similarity(self, dataset: str, extractor: str, knn_k: int) -> str:
        """Return the path of the top-k item graph of an extractor's features."""
        stem = Path(self.features(dataset, extractor)).stem
        return f"processed/{dataset}/similarity/{stem}-k{knn_k}.parquet"

    def extract_inputs(self, dataset: str, extractor: str, key: str) -> dict[str, str]:
        """Return the named input files of an extraction."""
        self.features(dataset, extractor, key)
        if self.encoder(extractor) is not None:
            return {"items": f"processed/{dataset}/items.parquet", "captions": self.captions(dataset, extractor)}
        return self._item_inputs(dataset, extractor)

    def caption_inputs(self, dataset: str, extractor: str, key: str) -> dict[str, str]:
        """Return the named input files of captioning."""
        self.captions(dataset, extractor, key)
        return self._item_inputs(dataset, extractor)

    def _item_inputs(self, dataset: str, extractor: str) -> dict[str, str]:
        spec = self.config.extractors[extractor]
        paths = {"items": f"processed/{dataset}/items.parquet"}
        if "manifest" in spec.needs():
            paths["manifest"] = f"processed/{dataset}/images/manifest.parquet"
        if "vectors" in spec.needs():
            paths["vectors"] = self._published_vectors(dataset, extractor)
        return paths

    def _published_vectors(self, dataset: str, extractor: str) -> str:
        path = self.dataset(dataset).published_vectors(dataset)
        if path is None:
            raise UserError(
                f"extractors.{extractor}: takes the vectors published with a dataset, but datasets.{dataset} "
                f"(source {self.dataset(dataset).source}) has none; set path to a file of vectors"
            )
        return path

    def extract_spec(self, extractor: str) -> dict[str, Any]:
        """Return what the extract stage is told: of captions, the settings of their text encoder."""
        return {"name": extractor} | self._stage_settings(self.encoder(extractor) or extractor)

    def caption_spec(self, extractor: str) -> dict[str, Any]:
        """Return what the caption stage is told."""
        return {"name": extractor} | self._stage_settings(extractor)

    def _stage_settings(self, extractor: str) -> dict[str, Any]:
        return {"settings": self.config.extractors[extractor].settings(), "identity": self.identity(extractor)}

    def extract_runtime(self, extractor: str, threads: int) -> dict[str, Any]:
        """Return device, batch size and threads of an extraction."""
        return self.config.extractors[self.encoder(extractor) or extractor].runtime() | {"threads": threads}

    def caption_runtime(self, extractor: str, threads: int) -> dict[str, Any]:
        """Return device, batch size and threads of captioning."""
        return self.config.extractors[extractor].runtime() | {"threads": threads}

    def extract_code(self, extractor: str) -> str:
        """Return the digest of the code that an extraction runs."""
        return self.code("extractors.extract", *self.config.extractors[self.encoder(extractor) or extractor].modules())

    def caption_code(self, extractor: str) -> str:
        """Return the digest of the code that captioning runs."""
        return self.code("extractors.caption", *self.config.extractors[extractor].modules())

    def gpus(self, extractor: str) -> int:
        """Return how many GPUs an extractor's job asks for."""
        return int(self.config.extractors[extractor].uses_gpu())

    # Experiments and runs

    def _run(self, experiment: str) -> str:
        chosen = self.config.experiments[experiment]
        dataset = self.dataset(chosen.dataset)
        return key_of(
            {
                "dataset": [chosen.dataset, self._source(chosen.dataset), dataset.prepare_spec(), dataset.split_spec()],
                "features": [[m, e, self.features_identity(e)] for m, e in chosen.modalities.items()],
                "model": chosen.model.identity(),
                "training": chosen.training.identity(),
            }
        )

    def run_folder(self, experiment: str) -> str:
        """Return the folder of the run that the configuration selects: its key covers all but evaluation."""
        return f"results/{experiment}/runs/{self.run(experiment)}"

    def train_inputs(self, experiment: str, run: str) -> dict[str, str]:
        """Return the named input files of training.

        Raises:
            UserError: `run` is not the run that the configuration selects.
        """
        if run != self.run(experiment):
            raise UserError(
                f"results/{experiment}/runs/{run}: the config selects run {self.run(experiment)}; "
                "a run of other settings cannot be made from these"
            )
        chosen = self.config.experiments[experiment]
        tables = ("interactions", "items", "users")
        paths = {name: f"processed/{chosen.dataset}/{name}.parquet" for name in tables}
        for modality, extractor in chosen.modalities.items():
            paths[f"features.{modality}"] = self.features(chosen.dataset, extractor)
            paths[f"similarity.{modality}"] = self.similarity(chosen.dataset, extractor, chosen.model.knn_k)
        return paths

    def train_spec(self, experiment: str) -> dict[str, Any]:
        """Return the modalities in the order of fusion, the model and its training."""
        chosen = self.config.experiments[experiment]
        return {
            "modalities": list(chosen.modalities),
            "model": chosen.model.identity(),
            "training": chosen.training.identity(),
        }

    def train_runtime(self, experiment: str, threads: int) -> dict[str, Any]:
        """Return device, checkpoint interval and threads of training."""
        return self.config.experiments[experiment].training.runtime() | {"threads": threads}

    def evaluate_inputs(self, experiment: str) -> dict[str, str]:
        """Return the named tables that evaluation reads beside the run's embeddings."""
        dataset = self.config.experiments[experiment].dataset
        return {name: f"processed/{dataset}/{name}.parquet" for name in ("interactions", "items", "users")}

    def evaluate_spec(self, experiment: str) -> dict[str, Any]:
        """Return the cut-offs, score and mask of evaluation."""
        return self.config.experiments[experiment].evaluation.identity()

    def publish_inputs(self, experiment: str) -> dict[str, str]:
        """Return the selected run's files, the data statistics, and the records of all stages behind them."""
        chosen = self.config.experiments[experiment]
        run, base = self.run_folder(experiment), f"processed/{chosen.dataset}"
        paths = {
            "evaluation": f"{run}/evaluation.json",
            "per_user": f"{run}/per_user.parquet",
            "recommendations": f"{run}/recommendations.parquet",
            "history": f"{run}/history.csv",
            "model": f"{run}/model.safetensors",
            "user_embeddings": f"{run}/user_embeddings.parquet",
            "item_embeddings": f"{run}/item_embeddings.parquet",
            "stats": f"{base}/stats.json",
            "record.prepare": f"{base}/prepare.stage.json",
            "record.split": f"{base}/split.stage.json",
        }
        for modality, extractor in chosen.modalities.items():
            if "manifest" in self.config.extractors[extractor].needs():
                paths["record.images"] = f"{base}/images/images.stage.json"
            if self.encoder(extractor) is not None:
                paths[f"record.caption.{modality}"] = _record(self.captions(chosen.dataset, extractor))
            paths[f"record.extract.{modality}"] = _record(self.features(chosen.dataset, extractor))
            graph = self.similarity(chosen.dataset, extractor, chosen.model.knn_k)
            paths[f"record.similarity.{modality}"] = _record(graph)
        return paths | {f"record.{stage}": f"{run}/{stage}.stage.json" for stage in ("train", "evaluate")}

    def provenance(self, experiment: str) -> dict[str, Any]:
        """Return what metrics.json says about where its numbers come from: every setting and every key."""
        chosen = self.config.experiments[experiment]
        dataset = self.dataset(chosen.dataset)
        return {
            "experiment": experiment,
            "dataset": chosen.dataset,
            "config": {
                "preset": chosen.preset,
                "source": self._source(chosen.dataset),
                "prepare": dataset.prepare_spec(),
                "split": dataset.split_spec(),
                "images": dataset.images_spec(),
                "modalities": list(chosen.modalities),
                "extractors": {m: {"name": e} | self.features_identity(e) for m, e in chosen.modalities.items()},
                "model": chosen.model.identity(),
                "training": chosen.training.identity(),
                "evaluation": chosen.evaluation.identity(),
            },
            "keys": {
                "run": self.run(experiment),
                "features": {m: key_of(self.features_identity(e)) for m, e in chosen.modalities.items()},
            },
        }

    def _code(self, *modules: str) -> str:
        return code_digest(self.root, modules)


def _check_key(extractor: str, key: str | None, expected: str) -> None:
    if key not in (None, expected):
        raise UserError(
            f"{extractor}-{key}: the config's {extractor!r} has key {expected}; "
            "a file of other settings cannot be made from these"
        )


def _record(output: str) -> str:
    return output.removesuffix(".parquet") + ".stage.json"
