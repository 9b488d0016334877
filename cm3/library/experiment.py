"""The files of an experiment of the pipeline from which the encoder of new items is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.features import features_file, graph_file, read_features
from cm3.common.files import read_json
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.pca import Projection, read_projection
from cm3.common.reduction import Reduction, projection_file
from cm3.common.strict import validate
from cm3.common.tensors import read_tensors
from cm3.config import Model, modality_weights
from cm3.library.features import searched_vectors
from cm3.library.new_items import ItemEncoder, item_encoder
from cm3.model.graph import item_item_matrix
from cm3.model.model import CM3, build_model, fill_missing
from cm3.training.run import read_neighbours

LARGEST_DIFFERENCE = 0.03
"""Of the vectors of the catalogue from the published ones, relative to their length: rounding of another device or precision."""


@dataclass(frozen=True)
class Experiment:
    """An experiment in `results/{experiment}`.

    Attributes:
        folder: with metrics.json, model.safetensors and item_embeddings.parquet.
        data: the folder of its data set, `processed/{dataset}`.
        items: (I, D) float32, its item vectors.
    """

    folder: Path
    data: Path
    items: np.ndarray

    def item_encoder(self) -> ItemEncoder | None:
        """Return the encoder of new items from the features and item graphs of the data set; None for other models than CM3.

        Raises:
            UserError: a file is missing or damaged, or the data set has changed since the model was trained.
            ValueError: features or item graphs are not those that the model was trained with.
        """
        config = read_json(self.folder / "metrics.json").get("config", {})
        settings = dict(config.get("model", {}))
        if settings.pop("name", None) != "cm3":
            return None
        model = validate(Model, settings, str(self.folder / "metrics.json"))
        parameters, metadata = read_tensors(self.folder / "model.safetensors")
        tables = (self.data / f"{name}.parquet" for name in ("interactions", "items", "users"))
        data = read_interactions(*tables)
        data.check_learnt_from(self.folder / "model.safetensors", metadata)
        paths = self._features(config)
        weights = modality_weights(model, list(paths))
        weights |= read_json(self.folder / "metrics.json")["training"].get("modality_weights", {})
        network, filled, searched = _network(
            data, paths, model, weights, config["training"].get("precision", "float32")
        )
        encoder = item_encoder(network, parameters, weights, filled, searched, self._projections(config))
        if config["training"].get("eval_embeddings") == "fresh":
            self._check(network)
        return encoder

    def _features(self, config: dict[str, Any]) -> dict[str, Path]:
        """Return the path of the features of each modality, in the order of fusion."""
        controls, paths = config.get("control") or {}, {}
        for modality in config["modalities"]:
            control = controls.get(modality, "")
            if control not in ("", "constant"):
                control = f"{control}-{config['training']['seed']}"
            reduction = _reductions(config).get(modality, "")
            paths[modality] = self._features_file(config, modality, reduction, control)
        return paths

    def _projections(self, config: dict[str, Any]) -> dict[str, Projection]:
        """Return the projections of the modalities whose features are reduced."""
        return {
            modality: read_projection(projection_file(str(self._features_file(config, modality)), reduction))
            for modality, reduction in _reductions(config).items()
        }

    def _features_file(self, config: dict[str, Any], modality: str, reduction: str = "", control: str = "") -> Path:
        extractor = config["extractors"][modality]
        kind = "caption" if "caption" in extractor else extractor["modality"]
        key = read_json(self.folder / "metrics.json")["keys"]["features"][modality]
        return self.data / features_file(kind, extractor["name"], key, control, reduction)

    def _check(self, network: CM3) -> None:
        """Compare the item vectors of the network with the published ones."""
        found = network.embed().items.numpy()
        if found.shape != self.items.shape or (
            np.linalg.norm(found - self.items) > LARGEST_DIFFERENCE * np.linalg.norm(self.items)
        ):
            raise ValueError(
                f"{self.folder}: the features or item graphs in {self.data} are not those that the model was trained with; "
                f"run the experiment again"
            )


def _reductions(config: dict[str, Any]) -> dict[str, str]:
    """Return the reduction by modality as in file names."""
    return {
        modality: validate(Reduction, settings, "reduce").suffix
        for modality, settings in config.get("reduce", {}).items()
    }


Vectors = dict[str, tuple[np.ndarray, np.ndarray]]


def _network(
    data: Interactions, paths: dict[str, Path], model: Model, weights: dict[str, float], precision: str
) -> tuple[CM3, Vectors, Vectors]:
    """Return the network with initial parameters, and the filled and the searched vectors as `item_encoder` takes them."""
    filled: Vectors = {}
    searched: Vectors = {}
    edges = []
    for modality, path in paths.items():
        features = read_features(path, data.item_ids)
        searched[modality] = searched_vectors(features.embedding, features.ok, model, str(path))
        filled[modality] = fill_missing(features.embedding, features.ok, model.missing, str(path)), features.ok
        graph = path.parents[2] / graph_file(path.stem, model.knn_k, model.knn_method, model.knn_missing)
        edges.append(read_neighbours(graph, model.knn_k, len(data.item_ids))[:2])
    item_graph = item_item_matrix(edges, [weights[modality] for modality in paths], len(data.item_ids))
    network = build_model([x for x, _ in filled.values()], data.matrix("train"), item_graph, model, 0, precision)
    return network, filled, searched
