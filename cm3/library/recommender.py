"""A trained model, and the folders that it is saved in and loaded from."""

import csv
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.errors import UserError
from cm3.common.files import atomic, read_json
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.tables import read_parquet, read_table, write_table
from cm3.common.tensors import write_tensors
from cm3.evaluation.item_weights import ItemWeights, read_item_weights
from cm3.library.experiment import Experiment
from cm3.library.ids import known_rows, pair_matrix, places
from cm3.library.new_items import ItemEncoder, read_item_encoder
from cm3.library.reranking import Reranking, read_reranking, remove_reranking

log = logging.getLogger("cm3.library")

USERS, ITEMS, SEEN = "user_embeddings.parquet", "item_embeddings.parquet", "seen.parquet"
WEIGHTS, ENCODER, HISTORY = "model.safetensors", "item_encoder.safetensors", "history.csv"
RERANKING = "reranking"
_SEEN = pa.schema([("user", pa.int32()), ("item", pa.int32())])


@dataclass(frozen=True)
class Recommender:
    """A trained model: one vector per user and item, whose dot product is the score, or item weights.

    Attributes:
        user_ids, item_ids: U and I ids, in row order.
        users, items: (U, D) and (I, D) float32; D is 0 for a model with item weights. For approximate search, index
            `items` by inner product.
        seen: (U, I), 1 where a user has interacted with an item; None if unknown.
        history: losses and validation scores by epoch.
        weights: of a model such as EASE or ItemKNN: the scores of a user are the sum of the rows of the user's items.
        encoder: embeds new items from their features; None if the model cannot, or makes it from `experiment`.
        experiment: the experiment that the model was loaded from, with the features of its items.
        reranking: models that order the first items of the lists anew; None for the model's own order.
    """

    user_ids: list[str]
    item_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    seen: sp.csr_matrix | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    weights: ItemWeights | None = None
    encoder: ItemEncoder | None = None
    experiment: Experiment | None = None
    reranking: Reranking | None = None

    @cached_property
    def user_rows(self) -> Mapping[str, int]:
        """Row of each user id."""
        return places(self.user_ids, "user")

    @cached_property
    def item_rows(self) -> Mapping[str, int]:
        """Row of each item id."""
        return places(self.item_ids, "item")

    @cached_property
    def item_encoder(self) -> ItemEncoder | None:
        """The encoder of new items, read from the files of the experiment where the model has none; None if it cannot."""
        if self.encoder is None and self.experiment is not None:
            return self.experiment.item_encoder()
        return self.encoder

    @cached_property
    def unit_items(self) -> np.ndarray:
        """(I, D) float32, the vectors of the items scaled to unit norm."""
        norms = np.linalg.norm(self.items, axis=1, keepdims=True)
        found: np.ndarray = self.items / np.maximum(norms, np.finfo(np.float32).tiny)
        return found

    def save(self, folder: str | Path) -> None:
        """Write everything that `load` needs to `folder`, as Parquet, safetensors and CSV; old files are replaced."""
        place = Path(folder)
        for name, id_name, ids, vectors in (
            (USERS, "user_id", self.user_ids, self.users),
            (ITEMS, "item_id", self.item_ids, self.items),
        ):
            # A fixed-size list of Parquet has at least one number: a model with item weights stores a zero.
            held = vectors if vectors.shape[1] else np.zeros((len(ids), 1), np.float32)
            write_embeddings(place / name, id_name, ids, held, {})
        if self.seen is not None:
            pairs = self.seen.tocoo()
            write_table(place / SEEN, pa.table({"user": pairs.row, "item": pairs.col}).cast(_SEEN), _SEEN)
        if self.weights is not None:
            write_tensors(place / WEIGHTS, self.weights.tensors(), {})
        encoder = self._encoder_to_save()
        if encoder is not None:
            encoder.save(place / ENCODER)
        if self.history:
            _write_history(place / HISTORY, self.history)
        remove_reranking(place / RERANKING)
        if self.reranking is not None:
            self.reranking.save(place / RERANKING)
        for name, part in (
            (SEEN, self.seen),
            (WEIGHTS, self.weights),
            (ENCODER, encoder),
            (HISTORY, self.history),
        ):
            if part is None or (name == HISTORY and not self.history):
                (place / name).unlink(missing_ok=True)

    def _encoder_to_save(self) -> ItemEncoder | None:
        try:
            return self.item_encoder
        except (UserError, ValueError) as error:
            log.warning("the saved model cannot embed new items: %s", error)
            return None


def load(path: str | Path, interactions: str | Path | None = None) -> Recommender:
    """Load a folder written by `Recommender.save`, or the folder of an experiment, `results/{experiment}`.

    Args:
        path: the folder.
        interactions: an interactions.parquet of the pipeline, with what users have seen, next to items.parquet and
            users.parquet; by default, for an experiment's folder, that of its data set in `processed/` next to `results/`,
            if it exists. Users and items are matched by their ids; those that the model does not know are ignored. The
            features and item graphs next to it are read when new items are embedded.

    Raises:
        DamagedFileError: a file is damaged.
        UserError: files are missing.
    """
    folder = Path(path)
    history = _read_history(folder / HISTORY)
    data = Path(place) if (place := interactions or _prepared(folder)) is not None else None
    if not (folder / USERS).exists() and (folder / WEIGHTS).exists() and data is not None:
        return _weights_of_experiment(folder, data, history)
    if not (folder / USERS).exists() and _is_experiment(folder):
        raise ValueError(f"{folder}: {_why_not_loaded(folder)}")
    user_ids, item_ids = _ids(folder / USERS, "user_id"), _ids(folder / ITEMS, "item_id")
    users, _ = read_embeddings(folder / USERS, "user_id", user_ids)
    items, _ = read_embeddings(folder / ITEMS, "item_id", item_ids)
    seen = None
    if (folder / SEEN).exists() and interactions is None:
        table = read_table(folder / SEEN, _SEEN)
        shape = (len(user_ids), len(item_ids))
        seen = pair_matrix(table.column("user").to_numpy(), table.column("item").to_numpy(), shape)
    elif data is not None:
        seen = _seen(read_prepared(data), user_ids, item_ids)
    weights: ItemWeights | None = None
    if (folder / WEIGHTS).exists() and not _is_experiment(folder):
        weights, _ = read_item_weights(folder / WEIGHTS, len(item_ids))
        users, items = users[:, :0], items[:, :0]
    encoder = read_item_encoder(folder / ENCODER) if (folder / ENCODER).exists() else None
    reranking = read_reranking(folder / RERANKING, load)
    experiment = Experiment(folder, data.parent, items) if data is not None and _is_experiment(folder) else None
    return Recommender(
        user_ids, item_ids, users.copy(), items.copy(), seen, history, weights, encoder, experiment, reranking
    )


def _weights_of_experiment(folder: Path, interactions: Path, history: list[dict[str, Any]]) -> Recommender:
    data = read_prepared(interactions)
    weights, _ = read_item_weights(folder / WEIGHTS, len(data.item_ids))
    users, items = (np.zeros((len(ids), 0), np.float32) for ids in (data.user_ids, data.item_ids))
    seen = _seen(data, data.user_ids, data.item_ids)
    return Recommender(data.user_ids, data.item_ids, users, items, seen, history, weights)


def read_prepared(interactions: Path) -> Interactions:
    """Read an interactions.parquet of the pipeline with the items.parquet and users.parquet next to it."""
    return read_interactions(
        interactions, interactions.with_name("items.parquet"), interactions.with_name("users.parquet")
    )


def _seen(data: Interactions, user_ids: list[str], item_ids: list[str]) -> sp.csr_matrix:
    users = known_rows(data.user_ids, places(user_ids, "user"))[data.users]
    items = known_rows(data.item_ids, places(item_ids, "item"))[data.items]
    known = (users >= 0) & (items >= 0)
    return pair_matrix(users[known], items[known], (len(user_ids), len(item_ids)))


def _is_experiment(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def _why_not_loaded(folder: Path) -> str:
    """Return why an experiment without embeddings cannot be loaded, and what to do."""
    if (folder / WEIGHTS).exists():
        return (
            f"has no {USERS}; if its model has item weights, give interactions=..., the interactions.parquet of its data set in "
            "processed/, which has the ids"
        )
    of = read_json(folder / "metrics.json").get("rerank", {}).get("of")
    if of is None:
        return "it has lists of items and no model; they are in recommendations.parquet"
    return (
        f"a re-ranking has lists of items and no model; they are in recommendations.parquet. Load {of}, or re-rank in Python by "
        "cm3.fit(..., rerank=...)"
    )


def _prepared(folder: Path) -> Path | None:
    if not _is_experiment(folder):
        return None
    dataset = read_json(folder / "metrics.json")["dataset"]
    place = folder.resolve().parents[1] / "processed" / dataset / "interactions.parquet"
    return place if place.exists() else None


def _ids(path: Path, name: str) -> list[str]:
    if not path.exists():
        raise ValueError(f"{path}: no such file; is it the folder of an experiment, or of a saved Recommender?")
    ids: list[str] = read_parquet(path, [name]).column(name).to_pylist()
    return ids


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def _read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a history.csv, numbers as numbers and empty cells as None; no rows without the file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    if not text:
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text
