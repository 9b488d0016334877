"""Publishing: the files of the selected run, the records of all stages before it, and the provenance in metrics.json."""

import shlex
from pathlib import Path
from typing import Any

from cm3.common.http import hide_secrets
from cm3.common.keys import key_of
from workflow.plan import data, features, runs
from workflow.plan.config import Config
from workflow.plan.task import Task


def publish_inputs(config: Config, experiment: str) -> dict[str, str]:
    """Return the files of the selected run, the tables and statistics of its data, and the records of all stages before it."""
    chosen = config.experiments[experiment]
    run, base = runs.run_folder(config, experiment), f"processed/{chosen.dataset}"
    trained = runs.training_folder(config, experiment, runs.selected_run(config, experiment))
    paths = {
        "evaluation": f"{run}/evaluation.json",
        "per_user": f"{run}/per_user.parquet",
        "recommendations": f"{run}/recommendations.parquet",
        "model": f"{trained}/{runs.model_file(config, experiment)}",
    }
    if chosen.model.exports == "embeddings":
        paths |= {
            "history": f"{trained}/history.csv",
            "user_embeddings": f"{trained}/user_embeddings.parquet",
            "item_embeddings": f"{trained}/item_embeddings.parquet",
        }
    paths |= {"items": f"{base}/items.parquet", "users": f"{base}/users.parquet", "stats": f"{base}/stats.json"}
    if chosen.dataset in data.generated(config):
        paths["record.generate"] = f"raw/{chosen.dataset}/generate.stage.json"
    paths |= {f"record.{stage}": f"{base}/{stage}.stage.json" for stage in ("prepare", "split")}
    graphs = runs.graphs_of(config, chosen)
    for modality, path in runs.features_of(config, chosen).items():
        extractor = chosen.modalities[modality]
        if "manifest" in config.extractors[extractor].needs():
            paths["record.images"] = f"{base}/images/images.stage.json"
        if features.encoder_of(config, extractor) is not None:
            captions = features.captions_path(config, chosen.dataset, extractor)
            paths[f"record.caption.{modality}"] = features.record_path(captions)
        extracted = features.features_path(config, chosen.dataset, extractor)
        paths[f"record.extract.{modality}"] = features.record_path(extracted)
        reduction = chosen.reduction(modality)
        if reduction:
            reduced = features.features_path(config, chosen.dataset, extractor, reduction=reduction)
            paths[f"record.reduce.{modality}"] = features.record_path(reduced)
        if chosen.control(modality):
            paths[f"record.control.{modality}"] = features.record_path(path)
        if modality in graphs:
            paths[f"record.similarity.{modality}"] = features.record_path(graphs[modality])
    return paths | runs.records(config, experiment)


def publish(config: Config, experiment: str) -> Task:
    """Return the task of publishing: what metrics.json says about the origin of its numbers."""
    provenance = _provenance(config, experiment)
    training = {"training": config.experiments[experiment].training_settings()}
    spec = provenance | {
        "config": provenance["config"] | training,
        "command": command(config, f"results/{experiment}/metrics.json"),
        "libraries": _model_libraries(config, experiment),
    }
    return Task("publish", spec, decides=provenance)


def command(config: Config, target: str) -> str:
    """Return the command that makes a file again, for the folder that holds the results."""
    options = config_options(config)
    return shlex.join(["snakemake", "--cores", "8", *options, *(["--"] if options else []), target])


def run_command(config: Config, *words: str) -> str:
    """Return a call of `./run` with the configuration of this run, for the user to type."""
    return shlex.join(["./run", *words, *config_options(config)])


def config_options(config: Config) -> list[str]:
    """Return the options of `snakemake` that name the configuration: its files, and the values of `--config`."""
    here = Path.cwd()
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in config.files]
    return [
        *(["--configfile", *names] if names else []),
        *(["--config", *map(hide_secrets, config.overrides)] if config.overrides else []),
    ]


def _model_libraries(config: Config, experiment: str) -> dict[str, list[str]]:
    """Return the libraries behind the outputs of each extraction and captioning, by the name of its record."""
    chosen = config.experiments[experiment]
    libraries = {}
    for modality, extractor in chosen.modalities.items():
        libraries[f"extract.{modality}"] = features.extract(config, extractor).libraries
        if features.encoder_of(config, extractor) is not None:
            libraries[f"caption.{modality}"] = features.caption(config, extractor).libraries
    return libraries


def _provenance(config: Config, experiment: str) -> dict[str, Any]:
    chosen = config.experiments[experiment]
    dataset = config.datasets[chosen.dataset]
    identities = {modality: features.features_identity(config, name) for modality, name in chosen.modalities.items()}
    reductions = {modality: reduction.identity() for modality, reduction in chosen.reductions.items()}
    return {
        "experiment": experiment,
        "dataset": chosen.dataset,
        "config": {
            "preset": chosen.preset,
            "source": data.generator_spec(config, chosen.dataset),
            "prepare": dataset.prepare_spec(),
            "split": dataset.split_spec(),
            "images": dataset.images_spec(),
            "modalities": list(chosen.modalities),
            "extractors": {m: {"name": name} | identities[m] for m, name in chosen.modalities.items()},
            "control": dict(chosen.controls) or None,
            **({"reduce": reductions} if reductions else {}),
            "model": {"name": chosen.model_name} | chosen.model.identity(),
            "training": chosen.training_identity(),
            "evaluation": chosen.evaluation.identity(),
        },
        "keys": {
            "run": runs.selected_run(config, experiment),
            "features": {modality: key_of(identity) for modality, identity in identities.items()},
        },
    }
