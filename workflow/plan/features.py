"""Features: paths, inputs and tasks of extraction, captioning, reductions, controls and item graphs, with the keys in their names.

Every function takes the checked configuration first. The parameters after it are named like the wildcards of the rules.
"""

import functools
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.features import features_file, graph_file
from cm3.common.keys import key_of
from cm3.common.reduction import Reduction
from cm3.model_spec import ModelSpec
from cm3.similarity.methods import InvertedFile
from workflow.plan import data
from workflow.plan.config import Config
from workflow.plan.shapes import shape_of
from workflow.plan.task import Task


@functools.lru_cache(maxsize=1024)
def extractor_identity(config: Config, extractor: str) -> dict[str, Any]:
    """Return what determines the output of an extractor: weights by digest or revision, never by path."""
    # Cached, because it can read the digest of a file of weights and Snakemake asks for it once per job.
    try:
        return config.extractors[extractor].identity()
    except UserError as error:
        raise UserError(f"extractors.{extractor}: {error}") from None


def encoder_of(config: Config, extractor: str) -> str | None:
    """Return the text extractor that encodes the captions of a captioner, None for other extractors."""
    return getattr(config.extractors[extractor], "encoder", None)


def features_identity(config: Config, extractor: str) -> dict[str, Any]:
    """Return what determines the features of an extractor: for a captioner, the identity of its encoder as well."""
    encoder = encoder_of(config, extractor)
    if encoder is None:
        return extractor_identity(config, extractor)
    return {"caption": extractor_identity(config, extractor), "encoder": extractor_identity(config, encoder)}


def features_path(
    config: Config, dataset: str, extractor: str, key: str | None = None, reduction: str = "", control: str = ""
) -> str:
    """Return the path of the features of an extractor, reduced by a `reduction`, or of the `control` that replaces them.

    Raises:
        UserError: `key` is not that of the configured extractor.
    """
    expected = key_of(features_identity(config, extractor))
    _check_key(extractor, key, expected)
    modality = config.extractors[extractor].modality
    return f"processed/{dataset}/{features_file(modality, extractor, expected, control, reduction)}"


def captions_path(config: Config, dataset: str, extractor: str, key: str | None = None) -> str:
    """Return the path of the captions of a captioner; their key does not depend on the encoder.

    Raises:
        UserError: `key` is not that of the configured captioner.
    """
    expected = key_of(extractor_identity(config, extractor))
    _check_key(extractor, key, expected)
    return f"processed/{dataset}/captions/{extractor}-{expected}.parquet"


def similarity_path(
    config: Config, dataset: str, extractor: str, model: ModelSpec, reduction: str = "", control: str = ""
) -> str:
    """Return the path of the top-k item graph of an extractor; settings other than the defaults end its name."""
    stem = Path(features_path(config, dataset, extractor, reduction=reduction, control=control)).stem
    settings: Any = model
    return f"processed/{dataset}/{graph_file(stem, settings.knn_k, settings.knn_method, settings.knn_missing)}"


def record_path(output: str) -> str:
    """Return the path of the stage's record of a Parquet output."""
    return output.removesuffix(".parquet") + ".stage.json"


def extract_inputs(config: Config, dataset: str, extractor: str, key: str) -> dict[str, str]:
    """Return the items and the captions, reviews, images or published vectors that an extractor reads.

    Raises:
        UserError: `key` is not that of the configured extractor, or the dataset has no published vectors.
    """
    features_path(config, dataset, extractor, key)
    if encoder_of(config, extractor) is not None:
        captions = captions_path(config, dataset, extractor)
        return {"items": f"processed/{dataset}/items.parquet", "captions": captions}
    return _item_inputs(config, dataset, extractor)


def caption_inputs(config: Config, dataset: str, extractor: str, key: str) -> dict[str, str]:
    """Return the items and the images that a captioner reads.

    Raises:
        UserError: `key` is not that of the configured captioner.
    """
    captions_path(config, dataset, extractor, key)
    return _item_inputs(config, dataset, extractor)


def _item_inputs(config: Config, dataset: str, extractor: str) -> dict[str, str]:
    needs = config.extractors[extractor].needs()
    paths = {"items": f"processed/{dataset}/items.parquet"}
    if "manifest" in needs:
        paths["manifest"] = f"processed/{dataset}/images/manifest.parquet"
    if "reviews" in needs:
        data.review_inputs(config, dataset)  # an error for a dataset without reviews
        paths |= {name: f"processed/{dataset}/{name}.parquet" for name in ("reviews", "interactions")}
    if "vectors" in needs:
        paths |= _published_vectors(config, dataset, extractor)
    return paths


def _published_vectors(config: Config, dataset: str, extractor: str) -> dict[str, str]:
    modality = config.extractors[extractor].modality
    chosen = config.datasets[dataset]
    paths = chosen.published_vectors(dataset, modality)
    if not paths:
        raise UserError(
            f"extractors.{extractor}: takes the {modality} vectors published with a dataset, but "
            f"datasets.{dataset} (source {chosen.source}) has none; set path to a file of vectors"
        )
    return data.raw_files(config, dataset, paths)


def extract(config: Config, extractor: str) -> Task:
    """Return the task of an extraction; captions are extracted by their text encoder."""
    return _extraction(config, "extract", extractor, encoder_of(config, extractor) or extractor)


def caption(config: Config, extractor: str) -> Task:
    """Return the task of captioning."""
    return _extraction(config, "caption", extractor, extractor)


def _extraction(config: Config, stage: str, name: str, extractor: str) -> Task:
    spec = config.extractors[extractor]
    identity = extractor_identity(config, extractor)
    # Settings and runtime hold paths of weights; the identity holds the weights' digest instead.
    arguments = {"name": name, "settings": spec.settings(), "identity": identity}
    return Task(stage, arguments, {spec.backend: spec}, spec.runtime(), decides=[name, identity])


def extract_gpus(config: Config, extractor: str) -> int:
    """Return how many GPUs an extraction needs: for captions, those of their text encoder."""
    return config.extractors[encoder_of(config, extractor) or extractor].gpus()


def caption_gpus(config: Config, extractor: str) -> int:
    """Return how many GPUs captioning needs."""
    return config.extractors[extractor].gpus()


def reduce_inputs(config: Config, dataset: str, extractor: str, key: str, reduction: str) -> dict[str, str]:
    """Return the features that are reduced.

    Raises:
        UserError: `key` is not that of the configured extractor, or the features exist already and are too narrow or too
            few for the reduction.
    """
    path = features_path(config, dataset, extractor, key)
    shape = shape_of(path)
    if shape is not None and shape.dim:
        _reduction(reduction).check(shape.dim, shape.rows, path)
    return {"features": path}


def reduce(config: Config, reduction: str) -> Task:
    """Return the task of reducing features: "pca512"."""
    return Task("reduce", _reduction(reduction).identity())


def _reduction(suffix: str) -> Reduction:
    return Reduction(method="pca", dim=int(suffix.removeprefix("pca")))


def control_inputs(config: Config, dataset: str, extractor: str, key: str, reduction: str) -> dict[str, str]:
    """Return the features that a control replaces; `reduction` is empty, or "-" and the name of a reduction.

    Raises:
        UserError: `key` is not that of the configured extractor.
    """
    return {"features": features_path(config, dataset, extractor, key, reduction.removeprefix("-"))}


def control(config: Config, modality: str, control: str) -> Task:
    """Return the task of replacing the features of a modality by a control: "gaussian-SEED", "shuffled-SEED" or "constant"."""
    kind, _, seed = control.partition("-")
    return Task("control", {"kind": kind, "seed": int(seed or 0), "modality": modality})


def similarity_inputs(
    config: Config, dataset: str, extractor: str, key: str, reduction: str, control: str
) -> dict[str, str]:
    """Return the features of an item graph; `reduction` and `control` are empty, or "-" and the name of one.

    Raises:
        UserError: `key` is not that of the configured extractor.
    """
    return {
        "features": features_path(
            config, dataset, extractor, key, *(one.removeprefix("-") for one in (reduction, control))
        )
    }


def similarity(config: Config, knn_k: str, variant: str = "") -> Task:
    """Return the task of finding the nearest neighbours of each item; `variant` follows k in the file name."""
    words = variant.split("-")
    method = next((word for word in ("hnsw", "ivf") if word in words), "exact")
    spec = {"knn_k": int(knn_k), "method": method, "missing": "mean" if "mean" in words else "drop"}
    return Task("similarity", spec, {"ivf": InvertedFile} if method == "ivf" else {})


def similarity_gpus(config: Config, dataset: str, extractor: str, variant: str) -> int:
    """Return how many GPUs the search for neighbours needs.

    None if the search is approximate, or if `training.device` of all models that read the graph is cpu.
    """
    readers = [
        experiment
        for experiment in config.experiments.values()
        if experiment.dataset == dataset
        and experiment.model.reads_item_graphs
        and extractor in experiment.modalities.values()
    ]
    on_cpu = readers and all(experiment.training.device == "cpu" for experiment in readers)
    approximate = {"hnsw", "ivf"} & set(variant.split("-"))
    return 0 if on_cpu or approximate else 1


def _check_key(extractor: str, key: str | None, expected: str) -> None:
    if key not in (None, expected):
        raise UserError(
            f"{extractor}-{key}: the key of {extractor!r} in the configuration is {expected}; "
            "a file of other settings cannot be made from it"
        )
