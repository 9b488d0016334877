"""CM3 as a library, without a workflow: fit on ids and arrays, recommend, find similar items, save and load."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch

from cm3.common.device import select_device
from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.files import read_json
from cm3.common.ids import id_text, missing_id
from cm3.common.interactions import read_interactions
from cm3.common.strict import nearest
from cm3.common.tables import read_parquet, read_table, write_table
from cm3.common.values import shown
from cm3.config import Model, Training, modality_weights, settings
from cm3.evaluation.ranking import Ranking, Validation
from cm3.model.graph import item_item_matrix
from cm3.model.model import build_model, fill_missing
from cm3.model.sampling import Sampler, derived_seed
from cm3.similarity.approximate import approximate_knn
from cm3.similarity.exact import knn
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.loop import fit as fit_network

log = logging.getLogger("cm3.library")

USERS, ITEMS, SEEN = "user_embeddings.parquet", "item_embeddings.parquet", "seen.parquet"
_SEEN = pa.schema([("user", pa.int32()), ("item", pa.int32())])


@dataclass(frozen=True)
class Recommender:
    """A trained model: one vector per user and item; their dot product is the score.

    Attributes:
        user_ids, item_ids: U and I ids, in row order.
        users, items: (U, D) and (I, D) float32. For approximate search, index `items` by inner product.
        seen: (U, I), 1 where a user has interacted with an item; None if unknown.
        history: losses and validation scores by epoch.
    """

    user_ids: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    seen: sp.csr_matrix | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write user_embeddings.parquet, item_embeddings.parquet and seen.parquet to `folder`; `load` reads them."""
        place = Path(folder)
        write_embeddings(place / USERS, "user_id", self.user_ids, self.users, {})
        write_embeddings(place / ITEMS, "item_id", self.item_ids, self.items, {})
        if self.seen is None:
            (place / SEEN).unlink(missing_ok=True)
        else:
            pairs = self.seen.tocoo()
            write_table(place / SEEN, pa.table({"user": pairs.row, "item": pairs.col}).cast(_SEEN), _SEEN)


def fit(
    interactions: Mapping[str, Sequence[Any]],
    features: Mapping[str, np.ndarray],
    item_ids: Sequence[Any],
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    valid_share: float = 0.1,
) -> Recommender:
    """Train CM3 and return it ready to recommend.

    A share of the interactions is held out for early stopping, never the only one of a user. Items without interactions
    (cold items) are embedded by their features and can be recommended like all others.

    Args:
        interactions: columns `user` and `item` of ids, one interaction per row: a dict of lists, a pandas or polars
            DataFrame or a pyarrow Table. Repeats count once. Ids are text or integers; 7, 7.0 and "7" are the same id. A
            missing id (None, NaN, NaT, an empty text) is an error.
        features: (I, d) vectors by modality, at least one: NumPy, torch, SciPy or lists; a row with NaN is a missing
            vector.
        item_ids: the ids of the I rows.
        model: settings of `cm3.config.Model` that differ from the defaults.
        training: settings of `cm3.config.Training`, such as {"epochs": 50, "seed": 1, "device": "cuda"}.
        valid_share: share of the interactions that is held out, between 0 and 1.

    Raises:
        ValueError: shapes or ids that do not fit together, or missing ids.
        UserError: settings that are not valid, or a loss that is not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> pairs = {"user": np.repeat(np.arange(20), 5), "item": rng.integers(0, 12, 100)}
        >>> vectors = {"text": rng.normal(size=(12, 8)), "image": rng.normal(size=(12, 4))}
        >>> shop = fit(pairs, vectors, range(12), {"embedding_dim": 4, "knn_k": 3}, {"epochs": 2, "device": "cpu"})
        >>> [len(items) for items in recommend(shop, ["0", "7"], k=3)]
        [3, 3]
    """
    chosen = settings("default", model or {}, training or {}, {}, "fit")
    if chosen.training.warm_start or chosen.training.processes > 1 or chosen.training.select_on != "valid":
        raise ValueError("training: warm_start, processes and select_on work in the pipeline only; remove them")
    if not 0 <= valid_share <= 1:
        raise ValueError(f"valid_share = {valid_share}: must be between 0 and 1")
    names = _id_texts(item_ids, "item_ids")
    users, items, user_ids = _pairs(interactions, names)
    held = _held_out(users, valid_share, chosen.training.seed)
    shape = (len(user_ids), len(names))
    observed, valid = (_matrix(users[part], items[part], shape) for part in (~held, held))
    if not valid.nnz:
        raise ValueError(_nothing_held_out(len(users), len(user_ids), valid_share))
    network = _network(features, names, observed, chosen.model, chosen.training)
    device = network.users.device
    sampler = Sampler(
        torch.from_numpy(users[~held]).to(device),
        torch.from_numpy(items[~held]).to(device),
        len(names),
        batch_size=chosen.training.batch_size,
        negative_sampling=chosen.model.uniformity_items,
        dedup_pairs=chosen.model.dedup_pairs,
        seed=derived_seed(chosen.training.seed, 1),
    )
    validation = Validation(valid, observed, chosen.training.monitor, device)
    fitted = fit_network(network, sampler, validation, chosen.training, NullCheckpoint())
    return Recommender(
        user_ids,
        names,
        fitted.users.cpu().numpy(),
        fitted.items.cpu().numpy(),
        _matrix(users, items, shape),
        fitted.history,
    )


def recommend(
    model: Recommender, users: Sequence[Any], k: int = 10, exclude_seen: bool = True
) -> list[list[tuple[str, float]]]:
    """Return each user's k best items as (item id, score), best first; fewer where fewer are left.

    Args:
        model: as `fit` or `load` gives it.
        users: user ids.
        k: length of the lists.
        exclude_seen: exclude the items that a user has interacted with.

    Raises:
        ValueError: an unknown user, k below 1, or `exclude_seen` of a model without the items that users have seen.
    """
    _check_length(k)
    rows = _rows(users, model.user_ids, "user")
    if exclude_seen and model.seen is None:
        raise ValueError(
            "the items that users have seen are not known; load with interactions=..., or set exclude_seen=False"
        )
    masked = (
        model.seen if exclude_seen and model.seen is not None else sp.csr_matrix((len(model.users), len(model.items)))
    )
    best, scores = Ranking(rows, masked).top(torch.from_numpy(model.users), torch.from_numpy(model.items), k)
    return _named(best, scores, model.item_ids)


def similar_items(model: Recommender, items: Sequence[Any], k: int = 10) -> list[list[tuple[str, float]]]:
    """Return the k items nearest to each item by the cosine of their trained vectors, as (item id, cosine).

    Raises:
        ValueError: an unknown item, or k below 1.
    """
    _check_length(k)
    rows = _rows(items, model.item_ids, "item")
    norms = np.linalg.norm(model.items, axis=1, keepdims=True)
    unit = torch.from_numpy(model.items / np.maximum(norms, np.finfo(np.float32).tiny))
    itself = sp.csr_matrix((np.ones(len(unit), np.float32), (range(len(unit)), range(len(unit)))), (len(unit),) * 2)
    best, scores = Ranking(rows, itself).top(unit, unit, k)
    return _named(best, scores, model.item_ids)


def load(path: str | Path, interactions: str | Path | None = None) -> Recommender:
    """Load a folder written by `Recommender.save`, or the folder of an experiment, `results/{experiment}`.

    Args:
        path: the folder.
        interactions: an interactions.parquet of the pipeline, with what users have seen, next to items.parquet and
            users.parquet; by default, for an experiment's folder, that of its data set in `processed/` next to `results/`,
            if it exists. Users and items are matched by their ids; those that the model does not know are ignored.

    Raises:
        DamagedFileError: a file is damaged.
        UserError: files are missing.
    """
    folder = Path(path)
    user_ids, item_ids = _ids(folder / USERS, "user_id"), _ids(folder / ITEMS, "item_id")
    users, _ = read_embeddings(folder / USERS, "user_id", user_ids)
    items, _ = read_embeddings(folder / ITEMS, "item_id", item_ids)
    shape = (len(user_ids), len(item_ids))
    seen = None
    if (folder / SEEN).exists() and interactions is None:
        table = read_table(folder / SEEN, _SEEN)
        seen = _matrix(table.column("user").to_numpy(), table.column("item").to_numpy(), shape)
    elif (place := interactions or _prepared(folder)) is not None:
        seen = _seen(Path(place), user_ids, item_ids)
    return Recommender(user_ids, item_ids, users.copy(), items.copy(), seen)


def _seen(interactions: Path, user_ids: list[str], item_ids: list[str]) -> sp.csr_matrix:
    data = read_interactions(
        interactions, interactions.with_name("items.parquet"), interactions.with_name("users.parquet")
    )
    users, items = (
        np.asarray([place.get(name, -1) for name in names], np.int64)[rows]
        for place, names, rows in (
            (_places(user_ids), data.user_ids, data.users),
            (_places(item_ids), data.item_ids, data.items),
        )
    )
    known = (users >= 0) & (items >= 0)
    return _matrix(users[known], items[known], (len(user_ids), len(item_ids)))


def _places(ids: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(ids)}


def _prepared(folder: Path) -> Path | None:
    metrics = folder / "metrics.json"
    if not metrics.exists():
        return None
    place = folder.resolve().parents[1] / "processed" / read_json(metrics)["dataset"] / "interactions.parquet"
    return place if place.exists() else None


def _ids(path: Path, name: str) -> list[str]:
    if not path.exists():
        raise ValueError(f"{path}: no such file; is it the folder of an experiment, or of a saved Recommender?")
    ids: list[str] = read_parquet(path, [name]).column(name).to_pylist()
    return ids


def _pairs(interactions: Mapping[str, Sequence[Any]], names: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    columns = [_id_texts(_column(interactions, name), f"interactions[{name!r}]") for name in ("user", "item")]
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"interactions: {len(columns[0])} users and {len(columns[1])} items")
    if not columns[0]:
        raise ValueError("interactions: has no rows")
    user_ids = sorted(set(columns[0]))
    places = _places(user_ids)
    users = np.asarray([places[name] for name in columns[0]], np.int64)
    pairs = np.unique(np.stack([users, _rows_of(columns[1], names, "item")]), axis=1)
    return pairs[0], pairs[1], user_ids


def _column(table: Mapping[str, Any], name: str) -> Any:
    names = getattr(table, "column_names", None) or list(getattr(table, "columns", ()))
    if names.count(name) > 1:
        raise ValueError(f"interactions: duplicate column {name!r}; rename one of them")
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"interactions: has no column {name!r}{nearest(name, names)}") from None
    except Exception as error:  # polars has an error of its own
        if names and name not in names:
            raise ValueError(f"interactions: has no column {name!r}{nearest(name, names)}") from error
        raise


def _id_texts(values: Any, where: str) -> list[str]:
    """Return ids as text. Raises ValueError with the row of one that is missing or neither text nor a whole number."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{where} = {values!r}: is one text; give a list of ids")
    texts = []
    for row, value in enumerate(_python_values(values)):
        try:
            text = id_text(value)
        except ValueError as error:
            raise ValueError(f"{where}, row {row}: {shown(value)} {error}") from None
        if text is None:
            raise ValueError(f"{where}, row {row}: {shown(value)} {missing_id(value)}; remove the row or give it an id")
        texts.append(text)
    return texts


def _python_values(values: Any) -> Sequence[Any]:
    """Return the values of a list, or of a column or array of pyarrow, pandas, polars, NumPy or torch."""
    for method in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, method):
            found: Sequence[Any] = getattr(values, method)()
            return found
    return list(values)


def _check_length(k: int) -> None:
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")


def _nothing_held_out(interactions: int, users: int, share: float) -> str:
    message = f"valid_share = {share} holds out none of {interactions} interactions for validation"
    if interactions == users:
        return f"{message}: each of the {users} users has only one, which is needed for training; give users more interactions"
    return f"{message}; raise it"


def _rows(wanted: Sequence[Any], ids: list[str], kind: str) -> np.ndarray:
    return _rows_of(_id_texts(wanted, f"{kind}s"), ids, kind)


def _rows_of(wanted: Sequence[str], ids: list[str], kind: str) -> np.ndarray:
    places = _places(ids)
    if len(places) < len(ids):
        raise ValueError(f"duplicate {kind} ids: {len(ids)} ids, {len(places)} different ones")
    rows = np.asarray([places.get(name, -1) for name in wanted], np.int64)
    if (rows < 0).any():
        unknown = wanted[int(np.flatnonzero(rows < 0)[0])]
        raise ValueError(f"{kind} {unknown!r} is unknown{nearest(unknown, ids[:10_000])}")
    return rows


def _held_out(users: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which interactions are held out: each with probability `share`, but one of every user never is."""
    draws = np.random.default_rng(derived_seed(seed, 2)).random(len(users))
    highest = np.lexsort((draws, users))[np.cumsum(np.bincount(users)) - 1]
    held = draws < share
    held[highest] = False
    return held


def _matrix(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    matrix = sp.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _network(
    features: Mapping[str, np.ndarray], names: list[str], observed: sp.csr_matrix, model: Model, training: Training
) -> Any:
    device, filled, neighbours = select_device(training.device), [], []
    for modality, vectors in features.items():
        where = f"features[{modality!r}]"
        values = _float32(vectors, where)
        if values.ndim != 2 or len(values) != len(names) or not values.shape[1]:
            raise ValueError(f"{where}: {values.shape} is not ({len(names)}, d), a row for each item")
        ok = np.asarray(np.isfinite(values).all(axis=1))
        filled.append(fill_missing(values, ok, model.missing, where))
        searched = fill_missing(values.copy(), ok, "mean", modality) if model.knn_missing == "mean" else values
        usable = np.flatnonzero((ok | (model.knn_missing == "mean")) & searched.any(axis=1))
        if len(usable) < model.knn_k:
            raise ValueError(
                f"{where}: {len(usable)} items have a vector that is not zero, fewer than model.knn_k = {model.knn_k}; set "
                f"model.knn_k to {len(usable)} or less"
                if len(usable)
                else f"{where}: all vectors are zero; leave this modality out or fix its vectors"
            )
        indices = _neighbours(torch.from_numpy(searched[usable]), model, device)
        neighbours.append((np.repeat(usable, model.knn_k), usable[indices.cpu().numpy().ravel()]))
    if not filled:
        raise ValueError("features: at least one modality is needed")
    weights = modality_weights(model, list(features))
    graph = item_item_matrix(neighbours, list(weights.values()), len(names))
    return build_model(filled, observed, graph, model, training.seed, training.precision).to(device)


def _float32(vectors: Any, where: str) -> np.ndarray:
    """Return a float32 copy of an array, tensor, sparse matrix or lists. Raises ValueError if they are not numbers."""
    if isinstance(vectors, torch.Tensor):
        return vectors.detach().to("cpu", torch.float32, copy=True).numpy()
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


def _neighbours(x: torch.Tensor, model: Model, device: torch.device) -> torch.Tensor:
    if model.knn_method != "exact":
        return approximate_knn(x, model.knn_k, model.knn_method)[0]
    # MPS has no float64, which exact scores need.
    return knn(x.to("cpu" if device.type == "mps" else device), model.knn_k)[0]


def _named(best: np.ndarray, scores: np.ndarray, ids: list[str]) -> list[list[tuple[str, float]]]:
    return [
        [(ids[item], float(score)) for item, score in zip(row, values, strict=True) if item >= 0]
        for row, values in zip(best.tolist(), scores.tolist(), strict=True)
    ]
