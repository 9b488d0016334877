"""The plan: which runs the configuration asks for, from which files, settings and code each is made, and its key."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from cm3.common.paths import expand
from cm3.common.stages import STAGES
from cm3.config import WARM
from cm3.evaluation.registry import modules as metric_modules
from workflow.plan.config import Config
from workflow.plan.data import DataPlan, Task
from workflow.plan.experiments import Experiment
from workflow.plan.folder import digest_of_folder

__all__ = ["Plan", "Task"]


class Plan(DataPlan):
    """Tasks, paths and keys by name. Every method is cheap and deterministic.

    An experiment's own settings make one run; a study makes more of them, at other seeds and grid points. All of them
    are alike: cells of an experiment, known by the key of their settings, in `results/{experiment}/runs/{run}`.

    Args:
        config: the checked configuration.
        root: the repository's root, whose code the digests cover.
        configfiles: those that the command line names, for the commands that results show.
    """

    def __init__(self, config: Config, root: Path, configfiles: Sequence[Path] = ()) -> None:
        super().__init__(config, root)
        self.configfiles = configfiles
        self.run = functools.cache(self._run)
        self.cells = functools.cache(self._cells)
        self.train = functools.cache(self._train)

    # Experiments and their cells

    def experiment(self, name: str) -> Experiment:
        """Return an experiment as its section has it."""
        return self.config.experiments[name]

    def features_of(self, experiment: Experiment) -> dict[str, str]:
        """Return the path of what the experiment reads as each modality's features: its control, where it has one."""
        return {
            modality: self.features_path(experiment.dataset, extractor, control=experiment.control(modality))
            for modality, extractor in experiment.modalities.items()
        }

    def graphs_of(self, experiment: Experiment) -> dict[str, str]:
        """Return the path of each modality's item graph, none where the model reads none."""
        if not experiment.model.reads_item_graphs:
            return {}
        return {
            m: self.similarity_path(experiment.dataset, extractor, experiment.model, experiment.control(m))
            for m, extractor in experiment.modalities.items()
        }

    def key(self, experiment: Experiment) -> str:
        """Return the key of a run of these settings; it covers all but evaluation."""
        dataset = self.dataset(experiment.dataset)
        source = self._source(experiment.dataset)
        features: list[list[Any]] = []
        for modality, extractor in experiment.modalities.items():
            control = experiment.control(modality)
            features.append([modality, extractor, self.features_identity(extractor), *([control] if control else [])])
        return key_of(
            {
                "dataset": [experiment.dataset, source, dataset.tables_spec(), dataset.split_spec()],
                "features": features,
                "model": experiment.model.identity(),
                "training": experiment.training_identity(),
            }
        )

    def _run(self, name: str) -> str:
        return self.key(self.experiment(name))

    def run_folder(self, name: str) -> str:
        """Return the folder of an experiment's own run."""
        return f"results/{name}/runs/{self.run(name)}"

    def _cells(self, name: str) -> dict[str, Experiment]:
        cells = {self.run(name): self.experiment(name)}
        for study in self.config.studies.values():
            if name in study.points:
                for _, _, settings in study.settings(name):
                    cells.setdefault(self.key(settings), settings)
        return cells

    def cell(self, name: str, run: str) -> Experiment:
        """Return the settings of one of an experiment's runs.

        Raises:
            UserError: neither the experiment's section nor a study has settings of this key.
        """
        cells = self.cells(name)
        if run not in cells:
            raise UserError(
                f"results/{name}/runs/{run}: the config selects run {self.run(name)} and {len(cells) - 1} others for "
                "studies; a run of other settings cannot be made from these"
            )
        return cells[run]

    def named(self, embeddings: bool) -> list[str]:
        """Return the names of the experiments whose models export embeddings, or of those that export item weights."""
        exports = "embeddings" if embeddings else "item_weights"
        return [name for name, experiment in self.config.experiments.items() if experiment.model.exports == exports]

    def train_inputs(self, name: str, run: str) -> dict[str, str]:
        """Return the named input files of training.

        Raises:
            UserError: the configuration asks for no such run, or an earlier run to start from is not there, or is what
                this run replaces.
        """
        chosen = self.cell(name, run)
        paths = self.tables(name)
        paths |= {f"features.{modality}": path for modality, path in self.features_of(chosen).items()}
        paths |= {f"similarity.{modality}": path for modality, path in self.graphs_of(chosen).items()}
        return paths | self._warm(name, chosen)

    def _warm(self, name: str, chosen: Experiment) -> dict[str, str]:
        if not chosen.training.warm_start:
            return {}
        folder = Path(expand(chosen.training.warm_start))
        if folder.resolve().is_relative_to((Path("results") / name).resolve()):
            raise UserError(
                f"experiments.{name}.training.warm_start = {str(folder)!r}: lies in the results that this run replaces; "
                "copy the folder elsewhere and name the copy"
            )
        earlier = {f"warm.{name}": f"{folder}/{file}" for name, file in WARM.items()}
        # Snakemake takes an output whose inputs are missing for up to date.
        absent = [path for path in earlier.values() if not Path(path).is_file()]
        if absent:
            raise UserError(f"experiments.{name}.training.warm_start = {str(folder)!r}: there is no {absent[0]}")
        return earlier

    def trainer(self, name: str) -> str:
        """Return the module of the stage that trains an experiment's model."""
        return STAGES[self.experiment(name).model.stage].module

    def train_gpus(self, name: str) -> int:
        """Return how many GPUs training asks for, one a process; what computes on the processor alone needs none."""
        experiment = self.experiment(name)
        needs = experiment.model.on_device and experiment.training.device != "cpu"
        return experiment.training.processes if needs else 0

    def _train(self, name: str, run: str) -> Task:
        """Return the task of training: modalities in the order of fusion, the model and its training."""
        chosen = self.cell(name, run)
        spec = {
            "modalities": list(chosen.modalities),
            "model": chosen.model.identity(),
            "training": chosen.training_identity(),
        }
        code = self.code(STAGES[chosen.model.stage].module, type(chosen.model).__module__)
        return Task(spec, code, chosen.training.runtime())

    def tables(self, name: str) -> dict[str, str]:
        """Return the paths of interactions, items and users of an experiment's dataset."""
        dataset = self.experiment(name).dataset
        return {table: f"processed/{dataset}/{table}.parquet" for table in ("interactions", "items", "users")}

    def evaluate(self, name: str, run: str) -> Task:
        """Return the task of evaluation: cut-offs, score and mask."""
        return Task(self.cell(name, run).evaluation.identity(), self.code("cm3.evaluation.evaluate", *metric_modules()))

    # Publishing

    def publish_inputs(self, name: str) -> dict[str, str]:
        """Return the files of the experiment's own run, the data statistics, and the records of all stages behind them."""
        chosen = self.experiment(name)
        run, base = self.run_folder(name), f"processed/{chosen.dataset}"
        paths = {
            "evaluation": f"{run}/evaluation.json",
            "per_user": f"{run}/per_user.parquet",
            "recommendations": f"{run}/recommendations.parquet",
            "model": f"{run}/model.safetensors",
        }
        if chosen.model.exports == "embeddings":
            paths |= {
                "history": f"{run}/history.csv",
                "user_embeddings": f"{run}/user_embeddings.parquet",
                "item_embeddings": f"{run}/item_embeddings.parquet",
            }
        paths["stats"] = f"{base}/stats.json"
        if chosen.dataset in self.generated():
            paths["record.generate"] = f"raw/{chosen.dataset}/generate.stage.json"
        paths |= {f"record.{stage}": f"{base}/{stage}.stage.json" for stage in ("prepare", "split")}
        graphs = self.graphs_of(chosen)
        for modality, features in self.features_of(chosen).items():
            extractor = chosen.modalities[modality]
            if "manifest" in self.config.extractors[extractor].needs():
                paths["record.images"] = f"{base}/images/images.stage.json"
            if self.encoder(extractor) is not None:
                paths[f"record.caption.{modality}"] = _record(self.captions_path(chosen.dataset, extractor))
            paths[f"record.extract.{modality}"] = _record(self.features_path(chosen.dataset, extractor))
            if chosen.control(modality):
                paths[f"record.control.{modality}"] = _record(features)
            if modality in graphs:
                paths[f"record.similarity.{modality}"] = _record(graphs[modality])
        return paths | {f"record.{stage}": f"{run}/{stage}.stage.json" for stage in ("train", "evaluate")}

    def publish(self, name: str) -> Task:
        """Return the task of publishing: what metrics.json says of where its numbers come from."""
        provenance = self._provenance(name)
        told = provenance | {"command": self.command(f"results/{name}/metrics.json")}
        return Task(told, self.code("workflow.publish"), decides=provenance)

    def command(self, target: str) -> str:
        """Return the command that makes a file again, from the folder that holds the results."""
        here = Path.cwd()
        names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in self.configfiles]
        options = ["--configfile", *names, "--"] if names else []
        return shlex.join(["snakemake", "--cores", "8", *options, target])

    def _provenance(self, name: str) -> dict[str, Any]:
        chosen = self.experiment(name)
        dataset = self.dataset(chosen.dataset)
        return {
            "experiment": name,
            "dataset": chosen.dataset,
            "config": {
                "preset": chosen.preset,
                "source": self._source(chosen.dataset),
                "prepare": dataset.prepare_spec(),
                "split": dataset.split_spec(),
                "images": dataset.images_spec(),
                "modalities": list(chosen.modalities),
                "extractors": {m: {"name": e} | self.features_identity(e) for m, e in chosen.modalities.items()},
                "control": dict(chosen.controls) or None,
                "model": {"name": chosen.model_name} | chosen.model.identity(),
                "training": chosen.training_identity(),
                "evaluation": chosen.evaluation.identity(),
            },
            "keys": {
                "run": self.run(name),
                "features": {m: key_of(self.features_identity(e)) for m, e in chosen.modalities.items()},
            },
        }

    # Studies

    def study_inputs(self, study: str) -> dict[str, str]:
        """Return the tables of the dataset, and of each cell what `cm3.reports.analysis.compare` reads: `evaluation.EXPERIMENT.RUN`, ..."""
        points = self.config.studies[study].points
        paths = self.tables(next(iter(points)))
        for name in points:
            for cell in self._study_cells(study, name):
                run = cell["run"]
                paths |= {
                    f"{what}.{name}.{run}": f"results/{name}/runs/{run}/{file}"
                    for what, file in _COMPARED.items()
                    if self.experiment(name).model.exports == "embeddings" or not what.endswith("_embeddings")
                }
        return paths

    def study(self, study: str) -> Task:
        """Return the task of comparing a study's cells."""
        chosen = self.config.studies[study]
        spec: dict[str, Any] = {
            "study": study,
            "command": self.command(f"results/{study}/comparison.json"),
            "reference": chosen.reference,
            "metrics": list(chosen.metrics),
            "experiments": {name: self._described(name, list(chosen.points)) for name in chosen.points},
            "cells": [cell for name in chosen.points for cell in self._study_cells(study, name)],
        }
        decides = _without_command(spec) | {"cells": [_without_command(cell) for cell in spec["cells"]]}
        return Task(spec, self.code("cm3.reports.analysis.compare"), decides=decides)

    def study_call(self, study: str) -> dict[str, Any]:
        """Return what `cm3.reports.analysis.compare` is told: the task, and its inputs below a root that the job knows."""
        task = self.study(study)
        return {"spec": task.spec, "runtime": {}, "inputs": self.study_inputs(study), "code": task.code}

    def _study_cells(self, study: str, name: str) -> list[dict[str, Any]]:
        cells = []
        for point, seed, settings in self.config.studies[study].settings(name):
            run = self.key(settings)
            command = self.command(f"results/{name}/runs/{run}/evaluation.json")
            features = {m: Path(path).stem for m, path in self.features_of(settings).items()}
            cells.append(
                {
                    "experiment": name,
                    "run": run,
                    "seed": seed,
                    "point": dict(point.values),
                    "command": command,
                    "keys": {"features": features},
                }
            )
        return cells

    def _described(self, name: str, among: list[str]) -> dict[str, Any]:
        chosen = self.experiment(name)
        plain = self._but_for_control(name)
        same = (
            other for other in among if not self.experiment(other).controls and self._but_for_control(other) == plain
        )
        return {
            "model": chosen.model_name,
            "dataset": chosen.dataset,
            "modalities": dict(chosen.modalities),
            "control": dict(chosen.controls) or None,
            "control_of": next(same, None) if chosen.controls else None,
        }

    def _but_for_control(self, name: str) -> list[Any]:
        chosen = self.experiment(name)
        model, training = chosen.model.identity(), chosen.training_identity()
        return [chosen.dataset, list(chosen.modalities.items()), chosen.model_name, model, training]

    # Pages

    def report_inputs(self, name: str) -> dict[str, str]:
        """Return the published files of an experiment, and of its dataset and modalities what its page shows.

        Images are shown where the experiment reads them, and where they are at hand without a download.
        """
        chosen = self.experiment(name)
        base, folder = f"processed/{chosen.dataset}", f"results/{name}"
        published = ["metrics.json", "per_user.parquet", "recommendations.parquet", "model.safetensors"]
        if chosen.model.exports == "embeddings":
            published += ["history.csv", "user_embeddings.parquet", "item_embeddings.parquet"]
        paths = self.tables(name) | {Path(file).stem: f"{folder}/{file}" for file in published}
        reads = any("manifest" in self.config.extractors[e].needs() for e in chosen.modalities.values())
        if reads or self.dataset(chosen.dataset).images_spec()["find"] == "folder":
            paths["manifest"] = f"{base}/images/manifest.parquet"
        for modality, extractor in chosen.modalities.items():
            paths[f"record.extract.{modality}"] = _record(self.features_path(chosen.dataset, extractor))
            if self.encoder(extractor) is not None:
                paths[f"captions.{modality}"] = self.captions_path(chosen.dataset, extractor)
        return paths | {f"similarity.{modality}": path for modality, path in self.graphs_of(chosen).items()}

    def page(self, module: str) -> Task:
        """Return the task of a page; its templates count as code."""
        templates = digest_of_folder(self.root / "cm3/reports/pages/templates")
        return Task({}, self.code(module), decides=templates)

    # Export to MMRec

    def mmrec_inputs(self, experiment: str) -> dict[str, str]:
        """Return the tables that the export reads, and the vectors that belong to it."""
        folder = f"results/{experiment}/mmrec/{experiment}"
        modalities = self.experiment(experiment).modalities
        return self.tables(experiment) | {f"vectors.{m}": f"{folder}/{m}_feat.npy" for m in modalities}

    def mmrec(self, experiment: str) -> Task:
        """Return the task of writing interactions, ids and settings for MMRec."""
        spec = {"experiment": experiment, "modalities": list(self.experiment(experiment).modalities)}
        return Task(spec, self.code("cm3.datasets.mmrec.export"))

    def mmrec_vectors_inputs(self, experiment: str, modality: str) -> dict[str, str]:
        """Return the features of a modality, and the interactions that number the items.

        Raises:
            UserError: the experiment has no such modality.
        """
        chosen = self.experiment(experiment)
        if modality not in chosen.modalities:
            raise UserError(
                f"experiments.{experiment} has no modality {modality!r}; it has {', '.join(chosen.modalities)}"
            )
        return {
            "features": self.features_of(chosen)[modality],
            "interactions": f"processed/{chosen.dataset}/interactions.parquet",
        }

    def mmrec_vectors(self) -> Task:
        """Return the task of writing one modality's vectors for MMRec."""
        return Task({}, self.code("cm3.datasets.mmrec.export_vectors"))


_COMPARED = {
    "evaluation": "evaluation.json",
    "per_user": "per_user.parquet",
    "recommendations": "recommendations.parquet",
    "train": "train.stage.json",
    "user_embeddings": "user_embeddings.parquet",
    "item_embeddings": "item_embeddings.parquet",
}


def _record(output: str) -> str:
    return output.removesuffix(".parquet") + ".stage.json"


def _without_command(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "command"}
