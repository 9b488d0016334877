"""Stage `train`: fit CM3 to the training interactions, stop early by validation, export the best epoch."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors.torch import save_file
from torch import Tensor

from cm3.checkpoint import Checkpoint
from cm3.config import Model, Training
from cm3.device import select_device, set_threads
from cm3.embeddings import write_embeddings
from cm3.graph import item_item_matrix
from cm3.interactions import Interactions, read_interactions
from cm3.loop import Fitted, fit
from cm3.model import fill_missing, seeded
from cm3.ranking import Validation
from cm3.sampling import Sampler, derived_seed
from cm3.weights import modality_weights
from stages.command import stage
from stages.errors import UserError
from stages.files import atomic, sha256_of
from stages.keys import canonical_json, key_of
from stages.strict import validate
from stages.tables import SIMILARITY, read_features, read_table

log = logging.getLogger("cm3.train")


def train(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    features: Mapping[str, Path],
    similarity: Mapping[str, Path],
    modalities: Sequence[str],
    model: Model,
    training: Training,
    model_output: Path,
    history_output: Path,
    users_output: Path,
    items_output: Path,
    code: str = "",
) -> dict[str, Any]:
    """Train and write the model (safetensors), its history (CSV) and the embeddings of users and items (Parquet).

    Checkpoints lie in `checkpoints/` beside the model until all is written; the same call goes on from there.

    Args:
        interactions, items, users: the tables of the prepared data set.
        features, similarity: files by modality.
        modalities: order of the control points of the fusion.
        model, training: settings.
        code: digest of the code, part of what a checkpoint is tied to.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: inputs that do not fit together, no validation interactions, or a loss that is not finite.
    """
    inputs = [interactions, items, users, *(files[m] for m in modalities for files in (features, similarity))]
    identity = {"modalities": list(modalities), "model": model.identity(), "training": training.identity()}
    fingerprint = key_of({"spec": identity, "code": code, "inputs": [sha256_of(path) for path in inputs]})
    checkpoint = Checkpoint(model_output.parent / "checkpoints", fingerprint)

    data = read_interactions(interactions, items, users)
    device = select_device(training.device)
    observed = data.matrix("train")
    vectors = {m: read_features(features[m], data.item_ids) for m in modalities}
    filled = [fill_missing(vectors[m].embedding, vectors[m].ok, model.missing, str(features[m])) for m in modalities]
    weights = modality_weights(model, modalities)
    neighbours = [_neighbours(similarity[m], model.knn_k, len(data.item_ids)) for m in modalities]
    graph = item_item_matrix(neighbours, [weights[m] for m in modalities], len(data.item_ids))
    network = seeded(filled, observed, graph, model, training.seed).to(device)
    n_parameters = sum(p.numel() for p in network.parameters())
    log.info(
        "%d users, %d items, %d training interactions, modalities %s, %d parameters, on %s",
        *observed.shape, observed.nnz, ", ".join(modalities), n_parameters, device.type,
    )  # fmt: skip
    fitted = fit(
        network,
        _sampler(data, model, training, device),
        _validation(data, "valid", observed, training, device, interactions),
        training,
        checkpoint,
        _validation(data, "test", observed, training, device, interactions) if training.select_on == "test" else None,
    )
    _write(fitted, data, identity, model_output, history_output, users_output, items_output)
    checkpoint.remove()
    return _facts(fitted, training, device, n_parameters, weights)


def _neighbours(path: Path, knn_k: int, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    table = read_table(path, SIMILARITY)
    items, others = (table.column(name).to_numpy().astype(np.int64) for name in ("item", "neighbour"))
    both = np.concatenate([items, others])
    if len(both) and not (both.min() >= 0 and both.max() < n_items):
        raise UserError(f"{path}: names item {both.max()}, but there are {n_items} items; delete it and run again")
    counts = np.bincount(items, minlength=n_items)
    wrong = np.flatnonzero((counts > 0) & (counts != knn_k))
    if len(wrong):
        raise UserError(
            f"{path}: item {wrong[0]} has {counts[wrong[0]]} neighbours, but knn_k is {knn_k}; delete it and run again"
        )
    return items, others


def _sampler(data: Interactions, model: Model, training: Training, device: torch.device) -> Sampler:
    users, items = (torch.from_numpy(x).to(device) for x in data.pairs("train"))
    try:
        return Sampler(
            users, items, len(data.item_ids), batch_size=training.batch_size, contrast=model.uniformity_items,
            dedup_pairs=model.dedup_pairs, seed=derived_seed(training.seed, 1),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; set model.uniformity_items to positive or uniform") from None


def _validation(
    data: Interactions, split: str, masked: sp.csr_matrix, training: Training, device: torch.device, path: Path
) -> Validation:
    try:
        return Validation(data.matrix(split), masked, training.monitor, device)
    except ValueError:
        raise UserError(
            f"{path}: no row is in the {split} split, which training.monitor needs; check the split"
        ) from None


def _write(
    fitted: Fitted,
    data: Interactions,
    identity: dict[str, Any],
    model_output: Path,
    history_output: Path,
    users_output: Path,
    items_output: Path,
) -> None:
    metadata = {"settings": identity, "epoch": fitted.best.epoch}
    for path, name, ids, vectors in (
        (users_output, "user_id", data.user_ids, fitted.users),
        (items_output, "item_id", data.item_ids, fitted.items),
    ):
        write_embeddings(path, name, ids, vectors.cpu().numpy(), metadata)
    with atomic(history_output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fitted.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(fitted.history)
    with atomic(model_output) as temporary:
        tensors: dict[str, Tensor] = {name: p.cpu().contiguous() for name, p in fitted.parameters.items()}
        # One header entry only: the order of several is not fixed, and equal runs shall give equal bytes.
        save_file(tensors, temporary, {"cm3": canonical_json(metadata)})


def _facts(
    fitted: Fitted, training: Training, device: torch.device, n_parameters: int, weights: dict[str, float]
) -> dict[str, Any]:
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
        "threads": torch.get_num_threads(),
        "seed": training.seed,
        "parameters": n_parameters,
        "modality_weights": weights,
    }
    if training.select_on == "test":
        facts["warning"] = (
            "select_on: test repeats the reference's choice of settings by TEST scores; "
            "these results are optimistic and for replication only"
        )
        log.warning("%s", facts["warning"])
    return facts


def main() -> None:
    """Run the stage: spec modalities, model, training; inputs interactions, items, users, features.M, similarity.M;
    outputs model, history, users, items, record.
    """
    with stage("cm3.train") as call:
        set_threads(call.runtime.get("threads"))
        spec, outputs = call.spec, call.outputs
        speed = {name: call.runtime[name] for name in Training.runtime_fields if name in call.runtime}
        by_kind = {
            kind: {m: call.inputs[f"{kind}.{m}"] for m in spec["modalities"]} for kind in ("features", "similarity")
        }
        facts = train(
            interactions=call.inputs["interactions"],
            items=call.inputs["items"],
            users=call.inputs["users"],
            features=by_kind["features"],
            similarity=by_kind["similarity"],
            modalities=spec["modalities"],
            model=validate(Model, spec["model"], "model"),
            training=validate(Training, {**spec["training"], **speed}, "training"),
            model_output=outputs["model"],
            history_output=outputs["history"],
            users_output=outputs["users"],
            items_output=outputs["items"],
            code=call.code,
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
