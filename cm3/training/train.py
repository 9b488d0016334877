"""Stage `train`: fit CM3 to the training interactions with early stopping, and export the best epoch."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3.common.cli import stage
from cm3.common.device import has_fast_bfloat16, memory_advice, select_device, set_threads
from cm3.common.distributed import ProcessShard, launch, process_group
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.files import sha256_of
from cm3.common.interactions import read_interactions
from cm3.common.keys import key_of
from cm3.common.strict import validate
from cm3.common.tables import release_memory
from cm3.common.torchrun import started_by_torchrun
from cm3.config import WARM, Model, Training, modality_weights
from cm3.model.graph import item_item_matrix
from cm3.model.model import build_model, fill_missing
from cm3.training.checkpoint import Checkpoint
from cm3.training.loop import fit
from cm3.training.memory import memory_hint
from cm3.training.pruning import read_trial
from cm3.training.run import read_neighbours, run_facts, training_sampler, validations, write_run
from cm3.training.trackers import Trackers
from cm3.training.warm_start import check_no_leakage, earlier_files, warm_start

log = logging.getLogger("cm3.training.train")


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
    shard: ProcessShard | None = None,
    warm: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Train and write the model (safetensors), its history (CSV) and the embeddings of users and items (Parquet).

    Checkpoints are in `checkpoints/` next to the model until all outputs are written; the same call resumes from them.

    Args:
        interactions, items, users: the tables of the prepared data set.
        features, similarity: files by modality.
        modalities: order of the control points of the fusion.
        model, training: settings.
        code: version of the code, part of the checkpoint's fingerprint.
        shard: of several processes that train one model (`cm3.common.distributed.process_group`); the first one writes.
        warm: files of an earlier run to start from, by the names in `cm3.config.WARM`.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: inputs that do not match, no validation interactions, an earlier run that was trained on interactions
            of the validation or test split, or a loss that is not finite.
    """
    inputs = [interactions, items, users, *(files[m] for m in modalities for files in (features, similarity))]
    for path in (warm or {}).values():
        if not path.exists():
            raise UserError(f"training.warm_start: {path}: no such file")
        inputs.append(path)
    identity = {"modalities": list(modalities), "model": model.identity(), "training": training.identity()}
    fingerprint = key_of({"spec": identity, "code": code, "inputs": [sha256_of(path) for path in inputs]})
    checkpoint = Checkpoint(model_output.parent / "checkpoints", fingerprint)

    data = read_interactions(interactions, items, users)
    device = select_device(training.device)
    observed = data.matrix("train")
    vectors = {m: read_features(features[m], data.item_ids) for m in modalities}
    filled = [fill_missing(vectors[m].embedding, vectors[m].ok, model.missing, str(features[m])) for m in modalities]
    weights = modality_weights(model, modalities)
    neighbours = [read_neighbours(similarity[m], model.knn_k, len(data.item_ids))[:2] for m in modalities]
    graph = item_item_matrix(neighbours, [weights[m] for m in modalities], len(data.item_ids))
    network = build_model(filled, observed, graph, model, training.seed, training.precision)
    if training.precision == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16(device):
        log.warning("training.precision: bfloat16: this CPU has no instructions for it; float32 is faster")
    with memory_advice(f"copying the model to {device.type}", memory_hint(training)):
        network = network.to(device)
    del vectors, filled, neighbours, graph  # the network has its own copies, perhaps in fewer bytes
    release_memory()
    network.stream_names = [*modalities, "fused"]
    started = {}
    if warm:
        tables = (warm[name] for name in ("interactions", "items", "users"))
        with earlier_files():
            learnt = read_interactions(*tables)
        check_no_leakage(data, learnt, warm["vectors"])
        started = {"warm_start": warm_start(network, data.user_ids, warm["model"], warm["vectors"])}
        log.info("starting from %s: %s", warm["model"], started["warm_start"])
    n_parameters = sum(p.numel() for p in network.parameters())
    log.info(
        "%d users, %d items, %d training interactions, modalities %s, %d parameters, on %s",
        *observed.shape,
        observed.nnz,
        ", ".join(modalities),
        n_parameters,
        device.type,
    )
    valid, test = validations(data, observed, training, device, interactions, shard)
    del observed
    sampler = training_sampler(
        data,
        training,
        device,
        negative_sampling=model.uniformity_items,
        dedup_pairs=model.dedup_pairs,
        advice="set model.uniformity_items to positive or uniform",
    )
    data = data.without_rows()
    curves = model_output.parent / "tensorboard"
    trial = read_trial(model_output.parent)
    trackers = Trackers([] if shard and shard.rank else training.trackers, model_output.parent, identity)
    fitted = fit(network, sampler, valid, training, checkpoint, test, curves, shard, trial, trackers)
    del network, sampler, valid, test
    if shard and shard.rank:
        return {}
    write_run(
        fitted,
        data,
        identity,
        model_output=model_output,
        history_output=history_output,
        users_output=users_output,
        items_output=items_output,
    )
    checkpoint.remove()
    facts = run_facts(fitted, training, device, n_parameters)
    trackers.finish(facts, [model_output, history_output, users_output, items_output])
    facts |= {"history_sha256": sha256_of(history_output)}
    return facts | {"modality_weights": weights} | started


def main() -> None:
    """Run the stage: spec modalities, model, training; inputs interactions, items, users, features.M, similarity.M;
    outputs model, history, users, items, record.
    """
    with stage("cm3.training.train") as call:
        spec, outputs = call.spec, call.outputs
        runtime = {name: call.runtime[name] for name in Training.runtime_fields if name in call.runtime}
        by_kind = {
            kind: {m: call.inputs[f"{kind}.{m}"] for m in spec["modalities"]} for kind in ("features", "similarity")
        }
        training = validate(Training, {**spec["training"], **runtime}, "training")
        if training.processes > 1 and not started_by_torchrun():
            launch(training.processes, "cm3.training.train", sys.argv[1:])
            return
        threads = call.runtime.get("threads")
        set_threads(threads and max(1, threads // training.processes))
        with process_group(select_device(training.device)) as shard:
            facts = train(
                interactions=call.inputs["interactions"],
                items=call.inputs["items"],
                users=call.inputs["users"],
                features=by_kind["features"],
                similarity=by_kind["similarity"],
                modalities=spec["modalities"],
                model=validate(Model, spec["model"], "model"),
                training=training,
                model_output=outputs["model"],
                history_output=outputs["history"],
                users_output=outputs["users"],
                items_output=outputs["items"],
                code=call.code,
                shard=shard,
                warm={name: call.inputs[f"warm.{name}"] for name in WARM} if training.warm_start else None,
            )
        call.record.update(facts)


if __name__ == "__main__":
    main()
