"""Starting from an earlier model, trained on less data."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cm3.model import CM3
from stages.errors import UserError

_BY_USER = ("users", "stream_logits")


@torch.no_grad()
def warm_start(network: CM3, user_ids: Sequence[str], model: Path, users: Path) -> dict[str, int]:
    """Put an earlier run's parameters in place of the initial ones; users that it did not know keep theirs.

    Items have no parameters of their own but their features, so new items need nothing.

    Args:
        network: as `cm3.model.seeded` gives it.
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
                f"{model}: holds {held} for {name}, where this model has {list(shape)}; start from a run with the same "
                "model settings, modalities and extractors, or leave training.warm_start out"
            )
        if name in _BY_USER:
            parameter[here.to(parameter.device)] = old[there].to(parameter)
        else:
            parameter.copy_(old)
    return {"known_users": len(known), "new_users": len(user_ids) - len(known)}


def _read(model: Path, users: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    try:
        tensors = load_file(model)
        ids = pq.read_table(users, columns=["user_id"], partitioning=None).column("user_id").to_pylist()
    except FileNotFoundError as error:
        raise UserError(f"training.warm_start: {error.filename or model}: no such file") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"training.warm_start: {model}, {users}: not an earlier run's files ({error})") from None
    if len(tensors.get("users", ())) != len(ids):
        raise UserError(f"training.warm_start: {model} is of other users than {users}; copy both from one run")
    return tensors, {name: row for row, name in enumerate(ids)}
