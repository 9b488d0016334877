"""Runs: an experiment's model at one set of settings, with the key, inputs and tasks of its training and evaluation.

The settings of an experiment's section make one run; studies add runs of the same experiment at other seeds and grid
points. `run` is the key of their settings. The files of a run are in `results/{experiment}/runs/{run}`. Experiments with
equal settings share the training, which is in the folder of one of them (`training_folder`); each evaluates it in its own.
Every function takes the checked configuration first; parameters named like the wildcards of the rules are names.
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
from workflow.plan.data import generator_spec, interactions_path, split_spec
from workflow.plan.experiments import Experiment
from workflow.plan.features import features_identity, features_path, similarity_path
from workflow.plan.task import Task

TRAINED = "train.stage.json"
"""The record of a finished training, in the folder of the run."""


def features_of(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the path of the features of each modality: reduced, or of the control, where the experiment has one."""
    return {
        modality: features_path(
            config,
            settings.dataset,
            extractor,
            reduction=settings.reduction(modality),
            control=settings.control(modality),
        )
        for modality, extractor in settings.modalities.items()
    }


def graphs_of(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the path of the item graph of each modality; empty if the model reads none."""
    if not settings.model.reads_item_graphs:
        return {}
    return {
        modality: similarity_path(
            config,
            settings.dataset,
            extractor,
            settings.model,
            settings.reduction(modality),
            settings.control(modality),
        )
        for modality, extractor in settings.modalities.items()
    }


def run_key(config: Config, settings: Experiment) -> str:
    """Return the key of a run: of everything but evaluation."""
    dataset = config.datasets[settings.dataset]
    source = generator_spec(config, settings.dataset)
    split = split_spec(config, settings.dataset, settings.split_seed)
    features: list[list[Any]] = []
    for modality, extractor in settings.modalities.items():
        replaced = filter(None, (settings.reduction(modality), settings.control(modality)))
        features.append([modality, extractor, features_identity(config, extractor), *replaced])
    return key_of(
        {
            "dataset": [settings.dataset, source, dataset.tables_spec(), split],
            "features": features,
            "model": settings.model.identity() | _combined_runs(config, settings),
            "training": settings.training_identity(),
        }
    )


def combined(config: Config, settings: Experiment) -> dict[str, Experiment]:
    """Return the experiments that a re-ranking combines, at its seed, on its split and the base first; empty for other models."""
    model = settings.model
    if not isinstance(model, Rerank):
        return {}
    at = {name: config.experiments[name].with_seed(settings.training.seed) for name in (model.of, *model.by)}
    return {name: chosen.on_split(settings.split_seed) for name, chosen in at.items()}


def _combined_runs(config: Config, settings: Experiment) -> dict[str, Any]:
    models = combined(config, settings)
    return {"runs": {name: run_key(config, chosen) for name, chosen in models.items()}} if models else {}


def _combined_files(config: Config, settings: Experiment) -> dict[str, str]:
    """Return the files from which a re-ranking computes the scores of its experiments, as `{experiment}.{file}`."""
    paths: dict[str, str] = {}
    for name, chosen in combined(config, settings).items():
        exported = _exported(config, name, run_key(config, chosen))
        paths |= {f"{name}.{kind}": path for kind, path in exported.items()}
    return paths


def _exported(config: Config, experiment: str, run: str) -> dict[str, str]:
    """Return the files from which the scores of a run are computed: its embeddings, its item weights, or a fitted re-ranking."""
    folder, model = training_folder(config, experiment, run), config.experiments[experiment].model
    if model.exports == "embeddings":
        return {kind: f"{folder}/{kind}.parquet" for kind in ("user_embeddings", "item_embeddings")}
    kind = "weights" if model.exports == "item_weights" else model.stage
    return {kind: f"{folder}/{model_file(config, experiment)}"}


@functools.lru_cache(maxsize=1024)
def selected_run(config: Config, experiment: str) -> str:
    """Return the key of the run that the section of an experiment selects; it is the one that is published."""
    return run_key(config, config.experiments[experiment])


def run_folder(config: Config, experiment: str) -> str:
    """Return the folder of the selected run, which has its evaluation."""
    return f"results/{experiment}/runs/{selected_run(config, experiment)}"


def training_folder(config: Config, experiment: str, run: str) -> str:
    """Return the folder that has the outputs of a run's training: that of the experiment `trained_in`."""
    return f"results/{trained_in(config, experiment, run)}/runs/{run}"


def records(config: Config, experiment: str) -> dict[str, str]:
    """Return the records of the training and the evaluation of the selected run."""
    trained = training_folder(config, experiment, selected_run(config, experiment))
    evaluated = run_folder(config, experiment)
    return {"record.train": f"{trained}/{TRAINED}", "record.evaluate": f"{evaluated}/evaluate.stage.json"}


def trained_in(config: Config, experiment: str, run: str) -> str:
    """Return the experiment in whose folder a run is trained, so that equal settings are trained once.

    Of the experiments that have the run, it is the first of these: `experiment` itself if the training has finished there;
    the first in the order of the configuration with a finished training; the first in that order that trains in the same
    way (device, processes, trackers, ...). In an object storage, where no files are looked at, the last of them decides.

    A decision between several experiments is kept in `config.decisions`, because the record of a training is absent while the
    training is repeated.
    """
    known = config.decisions
    if (place := f"{experiment}/{run}") in known:
        return known[place]
    sharing = [name for name in config.experiments if name == experiment or _shares(config, experiment, name, run)]
    if len(sharing) == 1:
        return experiment
    finished = [name for name in sharing if config.local and Path(f"results/{name}/runs/{run}", TRAINED).is_file()]
    for name in sharing:
        alike = [other for other in sharing if _runtime(config, other) == _runtime(config, name)]
        known[f"{name}/{run}"] = name if name in finished else (finished or alike)[0]
    return known[place]


def _runtime(config: Config, experiment: str) -> dict[str, Any]:
    return config.experiments[experiment].training.runtime()


def _shares(config: Config, experiment: str, other: str, run: str) -> bool:
    """Return whether another experiment has the same run and can train it in its folder."""
    own, its = config.experiments[experiment], config.experiments[other]
    if (own.dataset, own.model_name, [*own.modalities.items()]) != (
        its.dataset,
        its.model_name,
        [*its.modalities.items()],
    ):
        return False  # No key of it is computed, which could take weights that are not on this machine.
    try:
        settings = runs_of(config, other).get(run)
    except UserError:
        return False
    # A warm start can be from the results of the other experiment, which its own training refuses.
    return settings is not None and not settings.training.warm_start


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


def tables(config: Config, experiment: str, split_seed: int | None = None) -> dict[str, str]:
    """Return the paths of interactions, items and users of the experiment's dataset, on its own split or a further one."""
    dataset = config.experiments[experiment].dataset
    return {"interactions": interactions_path(dataset, split_seed)} | {
        table: f"processed/{dataset}/{table}.parquet" for table in ("items", "users")
    }


def train_inputs(config: Config, experiment: str, run: str) -> dict[str, str]:
    """Return the tables, features and graphs that training reads, and the earlier run that it starts from, if any.

    Raises:
        UserError: the configuration has no such run, or the earlier run is missing or in the folder of this one.
    """
    chosen = settings_of(config, experiment, run)
    paths = tables(config, experiment, chosen.split_seed)
    paths |= {f"features.{modality}": path for modality, path in features_of(config, chosen).items()}
    paths |= {f"similarity.{modality}": path for modality, path in graphs_of(config, chosen).items()}
    return paths | _combined_files(config, chosen) | _external_lists(config, chosen) | _warm_start(experiment, chosen)


def evaluate_inputs(config: Config, experiment: str, run: str) -> dict[str, str]:
    """Return the tables and what evaluation ranks items by: embeddings; item weights; a fitted re-ranking and the files of
    its models; or the checked lists of another tool.

    Raises:
        UserError: the configuration has no such run, or the file of the lists cannot be read.
    """
    chosen = settings_of(config, experiment, run)
    paths = tables(config, experiment, chosen.split_seed) | _exported(config, experiment, run)
    return paths | _combined_files(config, chosen) | _external_lists(config, chosen)


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
