"""Features of the caller: arrays of any kind -> float32, missing vectors filled, neighbours found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cm3.common.errors import UserError
from cm3.common.pca import Projection, fit_pca
from cm3.common.reduction import Reduction
from cm3.common.strict import nearest, validate
from cm3.model.model import fill_missing
from cm3.model_spec import ItemGraphs, ModelSpec
from cm3.similarity.approximate import approximate_knn
from cm3.similarity.exact import knn


@dataclass(frozen=True)
class Features:
    """Features of I items, by modality.

    Attributes:
        filled: (I, d_m) float32, rows without a vector filled as the model's settings say.
        ok: (I,) bool, whether the item had a vector.
        neighbours: item, neighbour and cosine of each edge, for a model that reads item graphs.
        searched: vectors (N_m, d_m) in which these were found, and their items (N_m,).
    """

    filled: Mapping[str, np.ndarray]
    ok: Mapping[str, np.ndarray]
    neighbours: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    searched: Mapping[str, tuple[np.ndarray, np.ndarray]]


def prepare_features(features: Mapping[str, Any], n_items: int, model: ModelSpec, device: torch.device) -> Features:
    """Return the features as the model reads them.

    Raises:
        ValueError: a shape that does not fit, values that are not numbers, or too few vectors for the item graph.
    """
    found = Features({}, {}, {}, {})
    filled, okays, neighbours, searched = {}, {}, {}, {}
    missing = model.missing if hasattr(model, "missing") else "zero"
    for modality, vectors in features.items():
        where = f"features[{modality!r}]"
        values = _of_items(vectors, n_items, where)
        ok = has_vector(values)
        filled[modality], okays[modality] = fill_missing(values, ok, missing, where), ok
        if isinstance(model, ItemGraphs):
            searched[modality] = searched_vectors(values, ok, model, where)
            some, usable = searched[modality]
            indices, scores = _neighbours(torch.from_numpy(some), model, device)
            neighbours[modality] = (
                np.repeat(usable, model.knn_k),
                usable[indices.cpu().numpy().ravel()],
                scores.cpu().numpy().ravel(),
            )
    found = Features(filled, okays, neighbours, searched)
    return found


def reduce_features(
    features: Mapping[str, Any], reduce: Mapping[str, Any], n_items: int
) -> tuple[dict[str, Any], dict[str, Projection]]:
    """Return features of which some modalities are reduced, and the projections of these.

    Args:
        features: by modality, of any kind.
        reduce: settings of `cm3.common.reduction.Reduction` by modality.
        n_items: number of items.

    Raises:
        UserError: an unknown modality or setting, vectors that are not longer than the reduced ones, or too few vectors.
        ValueError: a shape that does not fit, or values that are not numbers.
    """
    reduced, projections = dict(features), {}
    for modality, settings in reduce.items():
        if modality not in features:
            raise UserError(f"fit.reduce.{modality}: no such modality{nearest(modality, features)}")
        where = f"features[{modality!r}]"
        values = _of_items(features[modality], n_items, where)
        ok = has_vector(values)
        reduction = validate(Reduction, settings, f"fit.reduce.{modality}")
        reduction.check(values.shape[1], int(ok.sum()), where)
        projections[modality] = fit_pca(values, reduction.dim, ok)
        reduced[modality] = projections[modality].project(values)
    return reduced, projections


def _of_items(vectors: Any, n_items: int, where: str) -> np.ndarray:
    """Return vectors as float32, (I, d). Raises ValueError if they are not numbers or of another shape."""
    values = as_float32(vectors, where)
    if values.ndim != 2 or len(values) != n_items or not values.shape[1]:
        raise ValueError(f"{where}: {values.shape} is not ({n_items}, d), a row for each item")
    return values


def searched_vectors(
    values: np.ndarray, ok: np.ndarray, model: ItemGraphs, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors (N, d) among which neighbours are searched, and their items (N,).

    Args:
        values: (I, d) vectors; rows that are not `ok` (I,) are not read.
        where: name for messages.

    Raises:
        ValueError: fewer vectors than neighbours.
    """
    searched = fill_missing(values.copy(), ok, "mean", where) if model.knn_missing == "mean" else values
    usable = np.flatnonzero((ok | (model.knn_missing == "mean")) & searched.any(axis=1))
    if not len(usable):
        raise ValueError(f"{where}: all vectors are zero; leave this modality out or fix its vectors")
    if len(usable) < model.knn_k:
        raise ValueError(
            f"{where}: {len(usable)} items have a vector that is not zero, fewer than model.knn_k = {model.knn_k}; set "
            f"model.knn_k to {len(usable)} or less"
        )
    return searched[usable], usable


def _neighbours(x: torch.Tensor, model: ItemGraphs, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if model.knn_method != "exact":
        return approximate_knn(x, model.knn_k, model.knn_method)[:2]
    # MPS has no float64, which exact scores need.
    return knn(x.to("cpu" if device.type == "mps" else device), model.knn_k)


def nearest_rows(x: torch.Tensor, others: torch.Tensor, k: int) -> np.ndarray:
    """Return the k rows of `others` (N, d) nearest to each row of x (R, d) by cosine, (R, k) int64."""
    rows, among = torch.arange(len(others), len(others) + len(x)), torch.arange(len(others))
    found: np.ndarray = knn(torch.cat([others, x]), k, rows=rows, among=among)[0].numpy()
    return found


def has_vector(values: np.ndarray) -> np.ndarray:
    """Return which rows of (N, d) are vectors, (N,) bool; a row with NaN or infinity is a missing one."""
    return np.asarray(np.isfinite(values).all(axis=1))


def as_float32(vectors: Any, where: str) -> np.ndarray:
    """Return a float32 copy of an array, tensor, sparse matrix or lists. Raises ValueError if they are not numbers."""
    if isinstance(vectors, torch.Tensor):
        held = vectors.detach().cpu()
        vectors = held.numpy() if held.dtype == torch.float64 else held.to(torch.float32).numpy()
    if sp.issparse(vectors):
        vectors = vectors.toarray()
    try:
        numbers = np.asarray(vectors)
        with np.errstate(over="ignore"):
            values = np.array(numbers, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not an array of numbers, a row for each item ({error})") from None
    if numbers.dtype.kind == "f" and (np.isfinite(numbers) & np.isinf(values)).any():
        raise ValueError(f"{where}: holds a number beyond float32; scale the vectors")
    return values
