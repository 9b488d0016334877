"""Runs: an experiment's model at one set of settings, with the key, inputs and tasks of its training and evaluation.

The settings of an experiment's section make one run; studies add runs of the same experiment at other seeds and grid
points. All of them are in `results/{experiment}/runs/{run}`, where `run` is the key of their settings. Every function
takes the checked configuration first; parameters named like the wildcards of the rules are names.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cm3.common.errors import UserError
from cm3.common.input_files import check_readable
from cm3.common.keys import key_of
from cm3.common.paths import expand
from cm3.common.stages import STAGES
from cm3.config import WARM
from cm3.evaluation.external_config import External
from cm3.evaluation.registry import METRICS, metric_class
from cm3.evaluation.rerank_config import Rerank
from workflow.plan.config import Config
from workflow.plan.data import generator_spec
from workflow.plan.experiments import Experiment
from workflow.plan.features import features_identity, features_path, similarity_path
from workflow.plan.task import Task


def features_of(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the path of the features of each modality: of the control, where the experiment has one."""
    return {
        modality: features_path(config, settings.dataset, extractor, control=settings.control(modality))
        for modality, extractor in settings.modalities.items()
    }


def graphs_of(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the path of the item graph of each modality; empty if the model reads none."""
    if not settings.model.reads_item_graphs:
        return {}
    return {
        modality: similarity_path(config, settings.dataset, extractor, settings.model, settings.control(modality))
        for modality, extractor in settings.modalities.items()
    }


def run_key(config: Config, settings: Experiment) -> str:
    """Return the key of a run: of everything but evaluation."""
    dataset = config.datasets[settings.dataset]
    source = generator_spec(config, settings.dataset)
    features: list[list[Any]] = []
    for modality, extractor in settings.modalities.items():
        control = settings.control(modality)
        identity = features_identity(config, extractor)
        features.append([modality, extractor, identity, *([control] if control else [])])
    return key_of(
        {
            "dataset": [settings.dataset, source, dataset.tables_spec(), dataset.split_spec()],
            "features": features,
            "model": settings.model.identity() | _combined_runs(config, settings),
            "training": settings.training_identity(),
        }
    )


def combined(config: Config, settings: Experiment) -> dict[str, Experiment]:
    """Return the experiments that a re-ranking combines, at its seed and the base first; empty for other models."""
    model = settings.model
    if not isinstance(model, Rerank):
        return {}
    return {name: config.experiments[name].with_seed(settings.training.seed) for name in (model.of, *model.by)}


def _combined_runs(config: Config, settings: Experiment) -> dict[str, Any]:
    models = combined(config, settings)
    return {"runs": {name: run_key(config, chosen) for name, chosen in models.items()}} if models else {}


def _combined_files(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the files from which a re-ranking computes the scores of its experiments, as `{experiment}.{file}`."""
    paths = {}
    for name, chosen in combined(config, settings).items():
        run = f"results/{name}/runs/{run_key(config, chosen)}"
        if chosen.model.exports == "item_weights":
            paths[f"{name}.weights"] = f"{run}/model.safetensors"
        else:
            paths |= {f"{name}.{kind}": f"{run}/{kind}.parquet" for kind in ("user_embeddings", "item_embeddings")}
    return paths


@functools.lru_cache(maxsize=1024)
def selected_run(config: Config, experiment: str) -> str:
    """Return the key of the run that the section of an experiment selects; it is the one that is published."""
    return run_key(config, config.experiments[experiment])


def run_folder(config: Config, experiment: str) -> str:
    """Return the folder of the selected run."""
    return f"results/{experiment}/runs/{selected_run(config, experiment)}"


@functools.lru_cache(maxsize=1024)
def runs_of(config: Config, experiment: str) -> Mapping[str, Experiment]:
    """Return the settings of all runs of an experiment by key: the selected one, those of studies and of re-rankings."""
    runs = {selected_run(config, experiment): config.experiments[experiment]}
    for study in config.studies.values():
        if experiment in study.points:
            compared = [settings for _, _, settings in study.settings(experiment)]
            for settings in [*compared, *study.trial_settings(experiment)]:
                runs.setdefault(run_key(config, settings), settings)
    if isinstance(config.experiments[experiment].model, Rerank):
        return runs
    for name, other in config.experiments.items():
        if isinstance(other.model, Rerank):
            for reranking in runs_of(config, name).values():
                settings_here = combined(config, reranking).get(experiment)
                if settings_here is not None:
                    runs.setdefault(run_key(config, settings_here), settings_here)
    return runs


def settings_of(config: Config, experiment: str, run: str) -> Experiment:
    """Return the settings of one run.

    Raises:
        UserError: neither the experiment's section nor a study has settings of this key.
    """
    runs = runs_of(config, experiment)
    if run not in runs:
        raise UserError(
            f"results/{experiment}/runs/{run}: the configuration selects run {selected_run(config, experiment)} and "
            f"{len(runs) - 1} others for studies; a run of other settings cannot be made from it"
        )
    return runs[run]


def experiments_that_export(config: Config, exports: Literal["embeddings", "item_weights", "lists"]) -> list[str]:
    """Return the names of the experiments whose models export embeddings, item weights or lists."""
    return [name for name, experiment in config.experiments.items() if experiment.model.exports == exports]


def model_file(config: Config, experiment: str) -> str:
    """Return the name of the file of an experiment's model: tensors, or JSON for a model that only exports lists."""
    return "model.json" if config.experiments[experiment].model.exports == "lists" else "model.safetensors"


def tables(config: Config, experiment: str) -> dict[str, str]:
    """Return the paths of interactions, items and users of the experiment's dataset."""
    dataset = config.experiments[experiment].dataset
    return {table: f"processed/{dataset}/{table}.parquet" for table in ("interactions", "items", "users")}


def train_inputs(config: Config, experiment: str, run: str) -> dict[str, str]:
    """Return the tables, features and graphs that training reads, and the earlier run that it starts from, if any.

    Raises:
        UserError: the configuration has no such run, or the earlier run is missing or in the folder of this one.
    """
    chosen = settings_of(config, experiment, run)
    paths = tables(config, experiment)
    paths |= {f"features.{modality}": path for modality, path in features_of(config, chosen).items()}
    paths |= {f"similarity.{modality}": path for modality, path in graphs_of(config, chosen).items()}
    return paths | _combined_files(config, chosen) | _external_lists(config, chosen) | _warm_start(experiment, chosen)


def list_inputs(config: Config, experiment: str, run: str) -> dict[str, str]:
    """Return the tables and the files from which evaluation has the lists: the fitted re-ranking and the files of its models,
    or the checked lists of another tool.

    Raises:
        UserError: the configuration has no such run, or the file of the lists cannot be read.
    """
    chosen = settings_of(config, experiment, run)
    fitted = {chosen.model.stage: f"results/{experiment}/runs/{run}/model.json"}
    return tables(config, experiment) | fitted | _combined_files(config, chosen) | _external_lists(config, chosen)


def _external_lists(config: Config, settings: Experiment) -> dict[str, str]:
    if not isinstance(settings.model, External):
        return {}
    path = expand(settings.model.recommendations)
    if config.local:
        check_readable(Path(path), "model.recommendations")
    return {"lists": path}


def _warm_start(name: str, settings: Experiment) -> dict[str, str]:
    if not settings.training.warm_start:
        return {}
    folder = Path(expand(settings.training.warm_start))
    where = f"experiments.{name}.training.warm_start = {str(folder)!r}"
    if folder.resolve().is_relative_to((Path("results") / name).resolve()):
        raise UserError(
            f"{where}: is in the results that this run replaces; copy the folder elsewhere and name the copy"
        )
    earlier = {f"warm.{part}": f"{folder}/{file}" for part, file in WARM.items()}
    # Snakemake takes an output whose inputs are missing for up to date.
    absent = [path for path in earlier.values() if not Path(path).is_file()]
    if absent:
        raise UserError(f"{where}: {absent[0]} does not exist")
    return earlier


def train_module(config: Config, experiment: str) -> str:
    """Return the module of the stage that trains the experiment's model."""
    return STAGES[config.experiments[experiment].model.stage].module


def train_gpus(config: Config, experiment: str) -> float:
    """Return how many GPUs training needs: one per process, or its share of one; none for a model on the CPU."""
    training, model = config.experiments[experiment].training, config.experiments[experiment].model
    if not model.on_device or training.device == "cpu":
        return 0
    return training.processes if training.processes > 1 else training.gpu_share


@functools.lru_cache(maxsize=4096)
def train(config: Config, experiment: str, run: str) -> Task:
    """Return the task of training: modalities in the order of fusion, the model and its training."""
    chosen = settings_of(config, experiment, run)
    parts = {chosen.model_name: chosen.model}
    if isinstance(chosen.model, Rerank):
        return Task(chosen.model.stage, _rerank_spec(config, chosen, chosen.model), parts)
    if isinstance(chosen.model, External):
        return Task(chosen.model.stage, {"model": chosen.model.identity(), "monitor": chosen.training.monitor}, parts)
    spec = {
        "modalities": list(chosen.modalities),
        "model": chosen.model.identity(),
        "training": chosen.training_settings(),
    }
    decides = spec | {"training": chosen.training_identity()}
    return Task(chosen.model.stage, spec, parts, chosen.training.runtime(), decides)


def _rerank_spec(config: Config, settings: Experiment, model: Rerank) -> dict[str, Any]:
    return {
        "of": model.of,
        "scores": {name: chosen.evaluation.score for name, chosen in combined(config, settings).items()},
        "top": model.top,
        "weights": dict(model.weights),
        "grid": list(model.grid),
        "monitor": settings.training.monitor,
    }


def evaluate(config: Config, experiment: str, run: str) -> Task:
    """Return the task of evaluation: cut-offs, score and mask."""
    metrics = {name: metric_class(name) for name in METRICS}
    return Task("evaluate", settings_of(config, experiment, run).evaluation.identity(), parts=metrics)
