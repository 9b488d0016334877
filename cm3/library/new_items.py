"""Vectors of new items from their features alone, by the projections that CM3 has learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.pca import Projection
from cm3.common.strict import validate
from cm3.common.tensors import read_tensors, write_tensors
from cm3.config import Model
from cm3.library.features import as_float32, has_vector, nearest_rows
from cm3.library.ids import id_texts, places
from cm3.model.graph import item_item_matrix
from cm3.model.model import CM3
from cm3.model.streams import propagate_streams

if TYPE_CHECKING:
    from cm3.library.recommender import Recommender

_USER_TABLES = ("users", "stream_logits")


@dataclass(frozen=True)
class ItemEncoder:
    """What CM3 needs to embed an item that it was not trained with, as if it had been a cold item of the catalogue.

    Attributes:
        settings: of the model.
        weights: of the modalities, by name, in the order of fusion.
        parameters: of the projections and the fusion.
        fill: (d_m,) by modality, the input of an item without a vector.
        searched: (N_m, d_m) by modality, the vectors in which neighbours are searched.
        rows: (N_m,) int64 by modality, the items of these vectors.
        layers: tensors (I, (M+1) d), at least one: the items before the item-item graph, and after its first layers.
        projections: by modality, of features that are reduced before the model reads them: from their width to d_m.
    """

    settings: Model
    weights: Mapping[str, float]
    parameters: Mapping[str, Tensor]
    fill: Mapping[str, Tensor]
    searched: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    layers: Sequence[Tensor]
    projections: Mapping[str, Projection] = field(default_factory=dict)

    def embed(self, features: Mapping[str, Any]) -> np.ndarray:
        """Return the vectors of N new items, (N, D) float32.

        Each item gets the vector that a cold item has: from its features, and from the items of the catalogue nearest to
        it. New items are not neighbours of one another, and the vectors of the catalogue do not change.

        Args:
            features: (N, d_m) vectors by modality, as for `fit`: not reduced yet where the model reduces them. A row with
                NaN, or a modality that is left out, is a missing vector.

        Raises:
            ValueError: another modality, another width, or an item without any vector.
        """
        given = self._checked(features)
        n = len(next(iter(given.values())))
        present = {name: has_vector(x) for name, x in given.items()}
        without = np.flatnonzero(~np.any(list(present.values()), axis=0))
        if len(without):
            raise ValueError(f"features: item {without[0]} has no vector in any modality ({len(without)} such items)")
        filled = {
            name: np.where(present[name][:, None], x, self.fill[name].numpy()).astype(np.float32)
            for name, x in given.items()
        }
        own = self._projected(list(filled.values()), n)
        if not self.settings.item_graph:
            return own.numpy()
        graph = self._graph(given if self.settings.knn_missing == "drop" else filled, present, n)
        to_old, to_self = sp.csr_matrix(graph[:, : self.n_items]), graph[:, self.n_items :].diagonal()
        found = own
        for layer in self.layers[: self.settings.n_mm_layers]:
            near = torch.from_numpy(np.ascontiguousarray(to_old @ layer.numpy(), np.float32))
            found = torch.from_numpy(to_self.astype(np.float32))[:, None] * found + near
        return (found + own).numpy()

    @property
    def n_items(self) -> int:
        """Number of items of the catalogue."""
        return len(self.layers[0])

    def _checked(self, features: Mapping[str, Any]) -> dict[str, np.ndarray]:
        unknown = [name for name in features if name not in self.weights]
        if unknown or not features:
            raise ValueError(
                f"features: the model has the modalities {', '.join(self.weights)}, not {unknown[0] if unknown else 'none'}"
            )
        given = {name: as_float32(vectors, f"features[{name!r}]") for name, vectors in features.items()}
        n = len(next(iter(given.values())))
        for name, x in given.items():
            width = len(self.projections[name].mean) if name in self.projections else len(self.fill[name])
            if x.ndim != 2 or x.shape != (n, width):
                raise ValueError(f"features[{name!r}]: {x.shape} is not ({n}, {width})")
        given |= {name: one.project(given[name]) for name, one in self.projections.items() if name in given}
        absent = {name: np.full((n, len(fill)), np.nan, np.float32) for name, fill in self.fill.items()}
        return {name: given.get(name, absent[name]) for name in self.weights}

    @torch.no_grad()
    def _projected(self, features: Sequence[np.ndarray], n: int) -> Tensor:
        """Return the streams of new items before the item-item graph, (N, (M+1) d)."""
        nothing = sp.csr_matrix((1, n)), sp.csr_matrix((n, n))
        network = CM3([torch.from_numpy(x) for x in features], *nothing, self.settings)
        network.load_state_dict(dict(self.parameters), strict=False)
        return network.item_streams(torch.full((n,), 0.5))[0]

    def _graph(self, vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], n: int) -> sp.csr_matrix:
        """Return the rows of the new items in the item-item graph, (N, I + N)."""
        model, neighbours = self.settings, []
        for name, x in vectors.items():
            usable = np.flatnonzero((present[name] | (model.knn_missing == "mean")) & x.any(axis=1))
            new = self.n_items + usable
            others = np.empty((len(usable), 0), np.int64)
            if model.knn_k > 1 and len(usable):
                near = nearest_rows(torch.from_numpy(x[usable]), self.searched[name], model.knn_k - 1)
                others = self.rows[name].numpy()[near]
            columns = np.concatenate([new[:, None], others], axis=1)
            neighbours.append((np.repeat(new, model.knn_k), columns.ravel()))
        graph = item_item_matrix(neighbours, list(self.weights.values()), self.n_items + n)
        return sp.csr_matrix(graph[self.n_items :])

    def save(self, path: Path) -> None:
        """Write the encoder as safetensors."""
        by_kind = {"parameter": self.parameters, "fill": self.fill, "searched": self.searched, "rows": self.rows}
        tensors = {f"{kind}.{name}": x for kind, some in by_kind.items() for name, x in some.items()}
        tensors |= {f"layer.{n}": x for n, x in enumerate(self.layers)}
        tensors |= {
            f"projection.{name}.{part}": x
            for name, one in self.projections.items()
            for part, x in one.tensors().items()
        }
        settings = {"model": self.settings.identity(), "weights": dict(self.weights)}
        write_tensors(path, tensors, settings, "encoder")


def read_item_encoder(path: Path) -> ItemEncoder:
    """Read an encoder that `ItemEncoder.save` wrote.

    Raises:
        DamagedFileError: the file is damaged.
    """
    tensors, settings = read_tensors(path, "encoder")

    def of(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{kind}."): x for name, x in tensors.items() if name.startswith(f"{kind}.")}

    layers = of("layer")
    projections = [name.removesuffix(".axes") for name in of("projection") if name.endswith(".axes")]
    return ItemEncoder(
        validate(Model, settings["model"], str(path)),
        settings["weights"],
        of("parameter"),
        of("fill"),
        of("searched"),
        of("rows"),
        [layers[str(n)] for n in range(len(layers))],
        {name: Projection(**of(f"projection.{name}")) for name in projections},
    )


@torch.no_grad()
def item_encoder(
    network: CM3,
    parameters: Mapping[str, Tensor],
    weights: Mapping[str, float],
    filled: Mapping[str, tuple[np.ndarray, np.ndarray]],
    searched: Mapping[str, tuple[np.ndarray, np.ndarray]],
    projections: Mapping[str, Projection],
) -> ItemEncoder:
    """Return the encoder of a trained network.

    Args:
        network: as trained; its parameters are set to `parameters`.
        parameters: of the best epoch.
        weights: of the modalities.
        filled: (I, d_m) features of which missing rows are filled, and (I,) whether a row was not missing.
        searched: vectors (N_m, d_m) in which neighbours are searched, and their items (N_m,).
        projections: of the modalities whose features were reduced.
    """
    network.load_state_dict(dict(parameters), strict=False)
    settings = network.settings
    half = torch.full((network.n_items,), 0.5, device=network.users.device)
    streams, _ = network.item_streams(half)
    _, items = propagate_streams(network.adjacency, network.users, streams, settings.n_ui_layers)
    layers = [items]
    for _ in range(settings.n_mm_layers - 1):
        layers.append(network.item_graph.product(layers[-1]))
    fill = {}
    for name, (x, ok) in filled.items():
        row = x[~ok][0] if not ok.all() else x.mean(0, dtype=np.float64) if settings.missing == "mean" else 0 * x[0]
        fill[name] = torch.from_numpy(np.asarray(row, np.float32))
    return ItemEncoder(
        settings,
        dict(weights),
        {name: p.cpu() for name, p in parameters.items() if name not in _USER_TABLES},
        fill,
        {name: torch.from_numpy(x) for name, (x, _) in searched.items()},
        {name: torch.from_numpy(rows) for name, (_, rows) in searched.items()},
        [layer.cpu() for layer in layers],
        projections,
    )


def embed_items(model: "Recommender", features: Mapping[str, Any]) -> np.ndarray:
    """Return vectors (N, D) of new items from their features; `model.users @ vectors.T` are the scores.

    Raises:
        ValueError: the model cannot embed new items, or features that do not fit it; see `ItemEncoder.embed`.
        UserError: the features of an experiment are missing or damaged, or the data set has changed; see
            `cm3.library.experiment`.
    """
    encoder = model.item_encoder
    if encoder is None:
        raise ValueError(
            "this model cannot embed new items: only cm3 embeds items from features, and a model that was saved by release "
            "0.1.0, or loaded from a copy of an experiment's folder without the data set in processed/, has no features; "
            "train it with cm3.fit, or load it with interactions=..."
        )
    return encoder.embed(features)


def add_items(model: "Recommender", item_ids: Sequence[Any], features: Mapping[str, Any]) -> "Recommender":
    """Return the model with new items, which are recommended like all others.

    Args:
        item_ids: the ids of the N new items.
        features: as for `embed_items`.

    Raises:
        ValueError: an id that the model has already, a model with re-ranking, or as `embed_items`.
    """
    if model.reranking is not None:
        raise ValueError(
            f"the models that re-rank ({', '.join(model.reranking.parts)}) have no scores of new items; add the items to "
            "dataclasses.replace(model, reranking=None), or train again with them"
        )
    names = id_texts(item_ids, "item_ids")
    vectors = embed_items(model, features)
    if len(vectors) != len(names):
        raise ValueError(f"item_ids: {len(names)} ids and {len(vectors)} rows of features")
    known = next((name for name in names if name in model.item_rows), None)
    if known is not None:
        raise ValueError(f"item_ids: {known!r} is an item of the model already")
    places(names, "item")
    seen = None
    if model.seen is not None:
        seen = sp.csr_matrix(sp.hstack([model.seen, sp.csr_matrix((len(model.user_ids), len(names)))]))
    return replace(
        model,
        item_ids=[*model.item_ids, *names],
        items=np.concatenate([model.items, vectors]),
        seen=seen,
        encoder=model.item_encoder,
    )
