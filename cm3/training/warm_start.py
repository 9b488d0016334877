"""Warm start: initial parameters from an earlier run on less data."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.interactions import Interactions
from cm3.common.tables import read_parquet
from cm3.common.tensors import read_tensors
from cm3.model.model import CM3

_BY_USER = ("users", "stream_logits")


@torch.no_grad()
def warm_start(network: CM3, user_ids: Sequence[str], model: Path, users: Path) -> dict[str, int]:
    """Replace the initial parameters by those of an earlier run; users that it did not have keep their initial ones.

    Items have features and no parameters of their own, so new items need nothing.

    Args:
        network: as returned by `cm3.model.model.build_model`.
        user_ids: the U ids of its users, in order.
        model, users: `model.safetensors` and `user_embeddings.parquet` of the earlier run.

    Returns:
        `known_users` and `new_users`.

    Raises:
        UserError: unreadable files, or parameters of other shapes: another `embedding_dim`, other modalities or features.
    """
    before, rows = _read(model, users)
    known = [(place, rows[name]) for place, name in enumerate(user_ids) if name in rows]
    here, there = (torch.tensor(part, dtype=torch.int64) for part in (zip(*known, strict=True) if known else ((), ())))
    for name, parameter in network.named_parameters():
        old, shape = before.get(name), tuple(parameter.shape)
        fits = old is not None and (
            tuple(old.shape[1:]) == shape[1:] if name in _BY_USER else tuple(old.shape) == shape
        )
        if old is None or not fits:
            held = "nothing" if old is None else f"{list(old.shape)}"
            raise UserError(
                f"{model}: has {held} for {name}, but this model needs {list(shape)}; start from a run with the same "
                "model settings, modalities and extractors, or leave training.warm_start out"
            )
        if name in _BY_USER:
            parameter[here.to(parameter.device)] = old[there].to(parameter)
        else:
            parameter.copy_(old)
    return {"known_users": len(known), "new_users": len(user_ids) - len(known)}


def check_no_leakage(data: Interactions, earlier: Interactions, vectors: Path) -> None:
    """Raise if the earlier run was trained on interactions that are now in the validation or test split.

    Args:
        data, earlier: the interactions of this run, and those of the earlier run; matched by ids.
        vectors: `user_embeddings.parquet` of the earlier run, whose users must be those of `earlier`.

    Raises:
        UserError: some of them were, or the tables are not those of the earlier run.
    """
    folder = vectors.parent
    if earlier.user_ids != _user_ids(vectors):
        raise UserError(
            f"training.warm_start: the tables in {folder} have other users than {vectors.name}; copy the tables "
            "that the run was trained on, from before the new data"
        )
    places = []
    for now, then in ((data.user_ids, earlier.user_ids), (data.item_ids, earlier.item_ids)):
        place = {name: row for row, name in enumerate(now)}
        places.append(np.array([place.get(name, -1) for name in then], np.int64))
    users, items = (place[rows] for place, rows in zip(places, earlier.pairs("train"), strict=True))
    there = (users >= 0) & (items >= 0)
    held = data.matrix("valid", "test")
    leaked = int(held[users[there], items[there]].sum()) if there.any() else 0
    if leaked:
        raise UserError(
            f"training.warm_start: the run in {folder} was trained on {leaked} of the {held.nnz} interactions of "
            f"the validation and test splits; keep the earlier split by split.keep: {folder} of the dataset"
        )


def _read(model: Path, users: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    with earlier_files():
        tensors, _ = read_tensors(model)
    ids = _user_ids(users)
    if len(tensors.get("users", ())) != len(ids):
        raise UserError(f"training.warm_start: {model} has other users than {users}; copy both from one run")
    return tensors, {name: row for row, name in enumerate(ids)}


def _user_ids(vectors: Path) -> list[str]:
    with earlier_files():
        found: list[str] = read_parquet(vectors, ["user_id"]).column("user_id").to_pylist()
    return found


@contextlib.contextmanager
def earlier_files() -> Iterator[None]:
    """Name the setting in errors: the files are the user's, and no stage makes them again."""
    try:
        yield
    except DamagedFileError as error:
        raise UserError(
            f"training.warm_start: {error.path}: damaged ({error.reason}); copy it again from the earlier run"
        ) from None
    except UserError as error:
        raise UserError(f"training.warm_start: {error}") from None
