"""Stage `train` of every baseline: fit it to the training interactions and export what is scored."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cm3.baselines.config import BaselineSettings, baseline_settings
from cm3.baselines.inputs import Inputs, check_modalities, read_inputs
from cm3.common.cli import stage
from cm3.common.device import select_device, set_threads
from cm3.common.errors import UserError
from cm3.common.files import sha256_of
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.keys import key_of
from cm3.common.strict import validate
from cm3.config import Training
from cm3.evaluation.item_weights import ItemWeights
from cm3.evaluation.ranking import Validation
from cm3.model.network import Embeddings, Network
from cm3.model.sampling import Sampler, derived_seed
from cm3.training.checkpoint import Checkpoint
from cm3.training.loop import Best, Fitted, fit
from cm3.training.run import run_facts, validations, write_parameters, write_run

log = logging.getLogger("cm3.baselines.train")


def train(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    model: BaselineSettings,
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
    """Fit a baseline and write the model (safetensors), and where it exports embeddings these (Parquet) and a history.

    A network is checkpointed in `checkpoints/` beside the model until all is written; the same call goes on from
    there. Of `training`, a closed form reads monitor, select_on and device alone.

    Args:
        interactions, items, users: the tables of the prepared data set.
        model, training: settings.
        modalities: in their order; empty for a model that reads no features.
        features, similarity: files by modality; the latter for models with item graphs only.
        model_output: for models that export item weights the only output.
        history_output, users_output, items_output: for models that export embeddings.
        code: digest of the code, part of what a checkpoint is tied to.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: modalities or data that the model cannot work with, inputs that do not fit together, no validation
            interactions, or a loss that is not finite.
    """
    check_modalities(model, modalities)
    by_modality = [features or {}, (similarity or {}) if model.graphs else {}]
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
    module = import_module(model.module)
    checkpoint = Checkpoint(model_output.parent / "checkpoints", fingerprint)
    if model.trains:
        scored = validations(data, inputs.interactions, training, device, interactions)
        network = _seeded(module, inputs, model, training.seed).to(device)
        inputs = replace(inputs, features={}, neighbours={})  # the network holds what it needs of them
        curves = model_output.parent / "tensorboard"
        sampler = _sampler(data, network, model, training, device)
        fitted = fit(network, sampler, scored[0], training, checkpoint, scored[1], curves)
        n_parameters = sum(p.numel() for p in network.parameters())
    else:
        scored = validations(data, inputs.interactions, training, torch.device("cpu"), interactions)
        solution = module.solve(inputs, model, device)
        fitted = _measured(solution, inputs, training, scored)
        n_parameters = sum(values.numel() for values in fitted.parameters.values())
    if model.exports == "item_weights":
        write_parameters(fitted.parameters, {"settings": identity}, model_output)
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
    facts |= {"model": model.name, "modality_weights": dict(inputs.weights) or None}
    if not model.trains:
        facts |= dict.fromkeys(("epochs", "best_epoch", "best_loss", "seconds_per_epoch"))
    return facts


def _seeded(module: Any, inputs: Inputs, settings: BaselineSettings, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed))
        network: Network = module.network(inputs, settings)
        return network


def _sampler(
    data: Interactions, network: Network, settings: BaselineSettings, training: Training, device: torch.device
) -> Sampler:
    users, items = (torch.from_numpy(x).to(device) for x in data.pairs("train"))
    try:
        return Sampler(
            users,
            items,
            len(data.item_ids),
            batch_size=training.batch_size,
            negative_sampling=network.negative_sampling,
            dedup_pairs=getattr(settings, "dedup_pairs", False),
            seed=derived_seed(training.seed, 1),
        )
    except ValueError as error:
        raise UserError(f"{error}; take a model that draws none, such as directau, or leave such users out") from None


def _measured(
    solution: Embeddings | ItemWeights,
    inputs: Inputs,
    training: Training,
    scored: tuple[Validation, Validation | None],
) -> Fitted:
    """Return a closed form as if it were a run, with one row of history, before any epoch."""
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
    similarity.M; outputs model, record, and for models that export embeddings history, users, items.
    """
    with stage("cm3.baselines.train") as call:
        set_threads(call.runtime.get("threads"))
        model = baseline_settings(call.spec["model"])
        speed = {name: call.runtime[name] for name in Training.runtime_fields if name in call.runtime}
        modalities = call.spec["modalities"]
        kinds = ("features", "similarity") if model.graphs else ("features",)
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
