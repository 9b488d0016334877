"""Code of all training stages: read neighbours, validate, write results and facts."""

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cm3.common.device import has_tf32
from cm3.common.distributed import ProcessShard
from cm3.common.embeddings import write_embeddings
from cm3.common.errors import UserError
from cm3.common.files import atomic
from cm3.common.interactions import LEARNT_FROM, Interactions
from cm3.common.tables import SIMILARITY, read_table
from cm3.common.tensors import write_tensors
from cm3.config import Training
from cm3.evaluation.ranking import Validation
from cm3.model.sampling import NegativeSampling, Sampler, derived_seed
from cm3.training.loop import Fitted

log = logging.getLogger(__name__)


def read_neighbours(path: Path, knn_k: int, n_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return item, neighbour (int64) and score (float32) of a similarity file's rows.

    Raises:
        UserError: it names an item that does not exist, or an item has another number of neighbours than `knn_k`.
    """
    table = read_table(path, SIMILARITY)
    items, others = (table.column(name).to_numpy().astype(np.int64) for name in ("item", "neighbour"))
    both = np.concatenate([items, others])
    if len(both) and not (both.min() >= 0 and both.max() < n_items):
        wrong = both[(both < 0) | (both >= n_items)][0]
        raise UserError(f"{path}: names item {wrong}, but there are {n_items} items; delete it and run again")
    counts = np.bincount(items, minlength=n_items)
    other = np.flatnonzero((counts > 0) & (counts != knn_k))
    if len(other):
        raise UserError(
            f"{path}: item {other[0]} has {counts[other[0]]} neighbours, but knn_k is {knn_k}; delete it and run again"
        )
    return items, others, table.column("score").to_numpy()


def validations(
    data: Interactions,
    masked: sp.csr_matrix,
    training: Training,
    device: torch.device,
    path: Path,
    shard: ProcessShard | None = None,
) -> tuple[Validation, Validation | None]:
    """Return the monitored metric on the validation split, and on the test split for `training.select_on: test`.

    The `masked` (U, I) items are left out of the rankings. `shard` is this process's part, of several.

    Raises:
        UserError: no row of `path`, the interactions, is in such a split.
    """

    def scoring(split: str) -> Validation:
        try:
            return Validation(data.truth(split), masked, training.monitor, device, shard=shard)
        except ValueError:
            raise UserError(
                f"{path}: no row is in the {split} split, which training.monitor needs; check the split"
            ) from None

    return scoring("valid"), scoring("test") if training.select_on == "test" else None


def training_sampler(
    data: Interactions,
    training: Training,
    device: torch.device,
    *,
    negative_sampling: NegativeSampling,
    dedup_pairs: bool,
    advice: str,
) -> Sampler:
    """Return the sampler of batches of training interactions.

    Args:
        negative_sampling, dedup_pairs: as in `Sampler`.
        advice: next step for a user with data that have no negative samples.

    Raises:
        UserError: a user has interactions with every item, so that no negative item exists.
    """
    # Indices of tables are int32 in the files, too.
    users, items = (torch.from_numpy(ids.astype(np.int32)).to(device) for ids in data.pairs("train"))
    try:
        return Sampler(
            users,
            items,
            len(data.item_ids),
            batch_size=training.batch_size,
            negative_sampling=negative_sampling,
            dedup_pairs=dedup_pairs,
            seed=derived_seed(training.seed, 1),
        )
    except ValueError as error:
        raise UserError(f"{error}; {advice}") from None


def write_run(
    fitted: Fitted,
    data: Interactions,
    identity: dict[str, Any],
    *,
    model_output: Path,
    history_output: Path,
    users_output: Path,
    items_output: Path,
) -> None:
    """Write the best epoch's parameters (safetensors) and embeddings (Parquet), and the history (CSV)."""
    metadata = {"settings": identity, "epoch": fitted.best.epoch, LEARNT_FROM: data.digest}
    for path, name, ids, vectors in (
        (users_output, "user_id", data.user_ids, fitted.users),
        (items_output, "item_id", data.item_ids, fitted.items),
    ):
        write_embeddings(path, name, ids, vectors.cpu().numpy(), metadata)
    with atomic(history_output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fitted.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(fitted.history)
    write_tensors(model_output, fitted.parameters, metadata)


def run_facts(fitted: Fitted, training: Training, device: torch.device, n_parameters: int) -> dict[str, Any]:
    """Return the facts of a run for its stage's record."""
    best = fitted.best
    facts: dict[str, Any] = {
        "epochs": len(fitted.history),
        "best_epoch": best.epoch,
        "monitor": training.monitor,
        "best_valid": best.valid,
        "selection": {"split": training.select_on, "value": best.test if training.select_on == "test" else best.valid},
        "stopped": fitted.stopped,
        "best_loss": {k: v for k, v in fitted.history[best.epoch - 1].items() if k not in ("epoch",) and "@" not in k},
        "seconds_per_epoch": fitted.seconds_per_epoch,
        "device": device.type,
        "precision": "float32" if training.precision == "tf32" and not has_tf32(device) else training.precision,
        "threads": torch.get_num_threads(),
        "processes": training.processes,
        "seed": training.seed,
        "parameters": n_parameters,
    }
    if training.batches_per_step == "auto":
        facts["batches_per_step"] = fitted.batches_per_step
    if fitted.cuda_graph:
        facts["cuda_graph"] = True
    if training.select_on == "test":
        facts["warning"] = (
            "select_on: test repeats the reference's choice of settings by TEST scores; "
            "these results are optimistic and for replication only"
        )
        log.warning("%s", facts["warning"])
    return facts
