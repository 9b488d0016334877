"""Training stage of the baselines: fit one to the training interactions, export its embeddings or item weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cm3.baselines.base import Baseline, ClosedForm, NetworkBaseline, parse_baseline
from cm3.baselines.inputs import Inputs, check_modalities, read_inputs
from cm3.common.cli import stage
from cm3.common.device import memory_advice, select_device, set_threads
from cm3.common.files import sha256_of
from cm3.common.interactions import LEARNT_FROM, read_interactions
from cm3.common.keys import key_of
from cm3.common.strict import validate
from cm3.common.tables import release_memory
from cm3.common.tensors import write_tensors
from cm3.config import Training
from cm3.evaluation.item_weights import ItemWeights
from cm3.evaluation.ranking import Validation
from cm3.model.network import Embeddings, Network
from cm3.model.sampling import derived_seed
from cm3.training.checkpoint import Checkpoint
from cm3.training.loop import Fitted, fit
from cm3.training.memory import memory_hint
from cm3.training.pruning import read_trial
from cm3.training.run import run_facts, training_sampler, validations, write_run
from cm3.training.state import Best
from cm3.training.trackers import Trackers

log = logging.getLogger("cm3.baselines.train")


def train(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    model: Baseline,
    training: Training,
    model_output: Path,
    modalities: Sequence[str] = (),
    features: Mapping[str, Path] | None = None,
    similarity: Mapping[str, Path] | None = None,
    history_output: Path | None = None,
    users_output: Path | None = None,
    items_output: Path | None = None,
    code: str = "",
) -> dict[str, Any]:
    """Fit a baseline and write the model (safetensors); one with embeddings also writes these (Parquet) and a history.

    A network is checkpointed in `checkpoints/` next to the model until all outputs are written; the same call resumes
    from there. A closed form uses monitor, select_on and device of `training` only.

    Args:
        interactions, items, users: the tables of the prepared data set.
        model, training: settings.
        modalities: in their order; empty for a model that reads no features.
        features, similarity: files by modality; `similarity` only for models that read item graphs.
        model_output: the only output of a model that exports item weights.
        history_output, users_output, items_output: outputs of a model that exports embeddings.
        code: version of the code; a checkpoint of another one is not resumed.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: modalities or data that the model cannot use, inputs that do not fit together, no validation
            interactions, or a loss that is not finite.
    """
    check_modalities(model, modalities)
    by_modality = [features or {}, (similarity or {}) if model.reads_item_graphs else {}]
    paths = [interactions, items, users, *(files[m] for m in modalities for files in by_modality if files)]
    identity = {"modalities": list(modalities), "model": model.identity(), "training": training.identity()}
    fingerprint = key_of({"spec": identity, "code": code, "inputs": [sha256_of(path) for path in paths]})

    data = read_interactions(interactions, items, users)
    device = select_device(training.device)
    inputs = read_inputs(data, model, modalities, *by_modality)
    log.info(
        "%s: %d users, %d items, %d training interactions, modalities %s",
        model.name,
        *inputs.interactions.shape,
        inputs.interactions.nnz,
        ", ".join(modalities) or "none",
    )
    checkpoint = Checkpoint(model_output.parent / "checkpoints", fingerprint)
    trackers = None
    if isinstance(model, NetworkBaseline):
        scored = validations(data, inputs.interactions, training, device, interactions)
        network = build_network(model, inputs, training.seed)
        with memory_advice(f"copying the model to {device.type}", memory_hint(training)):
            network = network.to(device)
        inputs = replace(inputs, features={}, neighbours={})  # the network has its own copies
        release_memory()
        curves = model_output.parent / "tensorboard"
        sampler = training_sampler(
            data,
            training,
            device,
            negative_sampling=network.negative_sampling,
            dedup_pairs=getattr(model, "dedup_pairs", False),
            advice="use a model without negative samples, such as directau, or remove such users",
        )
        data = data.without_rows()
        trial = read_trial(model_output.parent)
        trackers = Trackers(training.trackers, model_output.parent, identity)
        fitted = fit(network, sampler, scored[0], training, checkpoint, scored[1], curves, None, trial, trackers)
        n_parameters = sum(p.numel() for p in network.parameters())
    elif isinstance(model, ClosedForm):
        scored = validations(data, inputs.interactions, training, torch.device("cpu"), interactions)
        fitted = scored_solution(model.solve(inputs, device), inputs, training, scored)
        n_parameters = sum(values.numel() for values in fitted.parameters.values())
    else:
        raise TypeError(f"{type(model).__name__} is neither a NetworkBaseline nor a ClosedForm")
    if model.exports == "item_weights":
        write_tensors(model_output, fitted.parameters, {"settings": identity, LEARNT_FROM: data.digest})
    else:
        if history_output is None or users_output is None or items_output is None:
            raise ValueError(
                f"{model.name} exports embeddings: history_output, users_output and items_output are needed"
            )
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
    if trackers is not None:
        trackers.finish(facts, [path for path in (model_output, history_output, users_output, items_output) if path])
    if history_output is not None and model.exports != "item_weights":
        facts["history_sha256"] = sha256_of(history_output)
    facts |= {"model": model.name, "modality_weights": dict(inputs.weights) or None}
    if not model.trains:
        facts |= dict.fromkeys(("epochs", "best_epoch", "best_loss", "seconds_per_epoch"))
    return facts


def build_network(model: NetworkBaseline, inputs: Inputs, seed: int) -> Network:
    """Return a network whose initial weights depend on `seed` alone; torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed))
        return model.network(inputs)


def scored_solution(
    solution: Embeddings | ItemWeights,
    inputs: Inputs,
    training: Training,
    scored: tuple[Validation, Validation | None],
) -> Fitted:
    """Return a solved model in the form of a finished run, whose history has one row, of epoch 0."""
    if isinstance(solution, ItemWeights):
        score, parameters = solution.scores(inputs.interactions), solution.tensors()
        users = items = torch.empty(0)
    else:
        users, items = solution.users, solution.items
        score, parameters = lambda rows: users[rows] @ items.T, {"users": users, "items": items}
    valid, test = (None if split is None else split.score_by(score) for split in scored)
    row: dict[str, Any] = {"epoch": 0, f"valid_{training.monitor}": valid}
    if test is not None:
        row[f"test_{training.monitor}"] = test
    log.info("valid %s %.4f", training.monitor, valid)
    return Fitted(parameters, users, items, Best(0, valid, test), [row], "solved in closed form", 0.0)


def main() -> None:
    """Run the stage: spec modalities, model {name, ..}, training; inputs interactions, items, users, features.M,
    similarity.M; outputs model and record, and history, users and items of a model that exports embeddings.
    """
    with stage("cm3.baselines.train") as call:
        set_threads(call.runtime.get("threads"))
        model = parse_baseline(call.spec["model"])
        speed = {name: call.runtime[name] for name in Training.runtime_fields if name in call.runtime}
        modalities = call.spec["modalities"]
        kinds = ("features", "similarity") if model.reads_item_graphs else ("features",)
        facts = train(
            interactions=call.inputs["interactions"],
            items=call.inputs["items"],
            users=call.inputs["users"],
            model=model,
            training=validate(Training, {**call.spec["training"], **speed}, "training"),
            modalities=modalities,
            **{kind: {m: call.inputs[f"{kind}.{m}"] for m in modalities} for kind in kinds},
            model_output=call.outputs["model"],
            history_output=call.outputs.get("history"),
            users_output=call.outputs.get("users"),
            items_output=call.outputs.get("items"),
            code=call.code,
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
