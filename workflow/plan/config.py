"""The whole configuration as one strict model: datasets, extractors and experiments, checked against each other."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest, validate
from cm3.datasets.registry import parse_dataset
from cm3.datasets.spec import SourceSpec
from cm3.evaluation.rerank_config import Rerank
from extractors.registry import parse_extractor
from extractors.spec import BackendSpec
from workflow.plan.best import with_best
from workflow.plan.experiments import Experiment, ExperimentSection, inherit, parse_settings
from workflow.plan.modalities import name_faults, with_weights_by_kind
from workflow.plan.reductions import with_reductions
from workflow.plan.searches import read_states
from workflow.plan.studies import Study, parse_study
from workflow.plan.yaml_keys import check_duplicate_keys, default_config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

Parsed = TypeVar("Parsed")


class Sections(Strict):
    """The top level of config.yaml."""

    datasets: dict[str, dict[str, Any]] = Field(description="sources of interactions, items and images")
    extractors: dict[str, dict[str, Any]] = Field(description="models that turn items into vectors")
    experiments: dict[str, dict[str, Any]] = Field(
        description="combinations of a dataset, extractors, a model and its training"
    )
    studies: dict[str, dict[str, Any]] = Field(default_factory=dict, description="experiments to compare")


@dataclass(frozen=True, eq=False)
class Config:
    """The checked configuration. Every name that an experiment or study refers to exists and is of the right kind.

    Two configurations are never equal, so that functions can be cached by configuration.

    Attributes:
        files: the files that `--configfile` names, for the commands that results state.
        local: the user's files are on this machine, not in an object storage.
        exists: whether there is a file at a path, for raw files that users put in place; on disk by default.
        overrides: the words of `--config`, for the commands that results state.
        decisions: what `runs.trained_in` has decided so far between experiments with equal settings, by
            `{experiment}/{run}`. Processes of jobs that read the Snakefile again begin with the decisions of the process
            that planned the jobs.
    """

    datasets: Mapping[str, SourceSpec]
    extractors: Mapping[str, BackendSpec]
    experiments: Mapping[str, Experiment]
    studies: Mapping[str, Study]
    files: Sequence[Path] = ()
    local: bool = True
    exists: Callable[[str], bool] = os.path.exists
    overrides: Sequence[str] = ()
    decisions: dict[str, str] = field(default_factory=dict)


def load_config(raw: Any, files: Sequence[Path] = (), local: bool = True, overrides: Sequence[str] = ()) -> Config:
    """Check the configuration as a whole.

    Args:
        raw: the content of config.yaml.
        files: the files that `--configfile` names.
        local: the user's files are on this machine, not in an object storage.
        overrides: the words of `--config`.

    Raises:
        UserError: all faults, one per line: path of the key, value, and the nearest valid name; or a key that is given
            twice in `files` or in the default config.yaml; or a target that `--configfile` has taken for a file of its own.
    """
    _check_no_target(files)
    check_duplicate_keys([default_config(), *files])
    sections = validate(Sections, with_overrides(raw, overrides), "")
    faults: list[str] = []
    datasets = _parse_each("datasets", sections.datasets, parse_dataset, faults)
    extractors = _parse_each("extractors", sections.extractors, parse_extractor, faults)

    for name, spec in extractors.items():
        encoder = getattr(spec, "encoder", None)
        if encoder is not None:
            faults += _reference(f"extractors.{name}.encoder", encoder, sections.extractors)
            if encoder in extractors and extractors[encoder].modality != "text":
                faults.append(
                    f"extractors.{name}.encoder = {encoder!r}: captions are encoded by a text extractor, "
                    f"but this one is of modality {extractors[encoder].modality!r}"
                )
            if spec.dtype != "float32":
                faults.append(
                    f"extractors.{name}.dtype = {spec.dtype!r}: captions are text; their vectors come from the encoder; "
                    f"set it on {encoder!r}"
                )

    def parse_experiment(name: str, data: dict[str, Any], where: str) -> Experiment:
        section = validate(ExperimentSection, inherit(name, sections.experiments), where)
        wrong = _reference(f"{where}.dataset", section.dataset, sections.datasets)
        for modality, extractor in section.modalities.items():
            path = f"{where}.modalities.{modality}"
            wrong += _reference(path, extractor, sections.extractors)
            if extractor in extractors:
                wrong += name_faults(path, modality, extractor, extractors)
        if wrong:
            raise UserError("\n".join(wrong))
        experiment = parse_settings(section, where)
        if not all(extractor in extractors for extractor in section.modalities.values()):
            return experiment
        return with_reductions(with_weights_by_kind(experiment, extractors), section.reduce, extractors, where)

    sections = sections.model_copy(update={"experiments": with_best(sections.experiments, datasets, extractors)})
    experiments = _parse_each("experiments", sections.experiments, parse_experiment, faults)

    def parse_comparison(name: str, data: dict[str, Any], where: str) -> Study | None:
        if name in sections.experiments:
            raise UserError(
                f"{where}: an experiment has the same name, and both would write to results/{name}; rename one"
            )
        named = data.get("experiments")
        refused = sections.experiments.keys() - experiments.keys()
        if isinstance(named, list) and any(isinstance(n, str) and n in refused for n in named):
            return None  # the fault of that experiment is already reported
        states = read_states(name) if "search" in data else None
        return parse_study(data, experiments, datasets, extractors, where, states)

    for name, experiment in experiments.items():
        if isinstance(experiment.model, Rerank):
            wrong = _check_rerank(name, experiment, experiment.model, experiments, sections.experiments)
            faults += wrong
            if not wrong and experiment.model.of in experiments:  # otherwise its own fault is reported
                experiments[name] = experiment.with_seed(experiments[experiment.model.of].training.seed)

    studies = _parse_each("studies", sections.studies, parse_comparison, faults)
    if faults:
        raise UserError("\n".join(faults))
    checked = {name: study for name, study in studies.items() if study}
    return Config(datasets, extractors, experiments, checked, files, local, overrides=overrides)


def with_overrides(raw: Any, overrides: Sequence[str]) -> Any:
    """Return a configuration with the values of `--config` in the types that they have in YAML.

    Snakemake has merged them already, but reads the values inside braces as text: `lr: 0.002` arrives as "0.002".
    """
    for words in overrides:
        key, _, text = words.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # Snakemake takes it as text, which is refused where it does not belong
        raw = merged(raw, {key: value})
    return raw


def merged(base: Any, values: Any) -> Any:
    """Return `values` on top of `base`: mappings are merged, anything else is replaced."""
    if not (isinstance(base, Mapping) and isinstance(values, Mapping)):
        return values
    return {**base, **{key: merged(base.get(key), value) for key, value in values.items()}}


def _check_no_target(files: Sequence[Path]) -> None:
    for path in files:
        absolute = path.absolute()
        if any(absolute.is_relative_to(Path(folder).absolute()) for folder in ("raw", "processed", "results")):
            raise UserError(
                f"--configfile takes {path} for a file of settings, because it takes all words up to the next option; "
                "put `--` before the target, or the target first"
            )


def _check_rerank(
    name: str,
    experiment: Experiment,
    model: Rerank,
    experiments: Mapping[str, Experiment],
    valid: Iterable[str],
) -> list[str]:
    faults = []
    for key, other in (("of", model.of), *(("by", other) for other in model.by)):
        path = f"experiments.{name}.model.{key}"
        faults += _reference(path, other, valid)
        chosen = experiments.get(other)
        if chosen is None:
            continue
        if chosen.model.exports == "lists":
            faults.append(f"{path} = {other!r}: has lists and no scores; name a model with embeddings or item weights")
        if chosen.dataset != experiment.dataset:
            faults.append(f"{path} = {other!r}: is on dataset {chosen.dataset!r}, but {name} on {experiment.dataset!r}")
    return faults


def _parse_each(
    section: str,
    entries: Mapping[str, dict[str, Any]],
    parse: Callable[[str, dict[str, Any], str], Parsed],
    faults: list[str],
) -> dict[str, Parsed]:
    parsed = {}
    for name, data in entries.items():
        where = f"{section}.{name}"
        if not _NAME.fullmatch(name):
            faults.append(f"{where}: use letters, digits, - and _ only, because the name becomes part of a path")
            continue
        try:
            parsed[name] = parse(name, data, where)
        except UserError as error:
            faults.append(str(error))
    return parsed


def _reference(path: str, name: str, valid: Iterable[str]) -> list[str]:
    return [] if name in valid else [f"{path} = {name!r}: no such name{nearest(name, valid)}"]
