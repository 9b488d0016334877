"""The whole configuration as one strict model: datasets, extractors and experiments, checked against each other."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field

from cm3.config import Evaluation, Model, Training, modality_weights, settings
from extractors.spec import ExtractorSpec, parse_extractor
from sources.config import parse_dataset
from sources.dataset_config import Dataset
from stages.errors import UserError
from stages.strict import Strict, nearest, validate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

Parsed = TypeVar("Parsed")


class Sections(Strict):
    """The top level of config.yaml."""

    datasets: dict[str, dict[str, Any]] = Field(description="where interactions, items and pictures come from")
    extractors: dict[str, dict[str, Any]] = Field(description="models that turn items into vectors")
    experiments: dict[str, dict[str, Any]] = Field(description="a dataset, its modalities, a model and its training")


class ExperimentSection(Strict):
    """One entry of `experiments`."""

    dataset: str = Field(description="a name under datasets")
    modalities: dict[str, str] = Field(min_length=1, description="modality -> extractor, in the order of fusion")
    preset: Literal["default", "official"] = Field("default", description="where unset values come from")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's model")
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's training")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's evaluation")


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: the preset's values with the section's own over them."""

    dataset: str
    modalities: Mapping[str, str]
    preset: str
    model: Model
    training: Training
    evaluation: Evaluation


@dataclass(frozen=True)
class Config:
    """The checked configuration. Every name in an experiment exists and fits."""

    datasets: Mapping[str, Dataset]
    extractors: Mapping[str, ExtractorSpec]
    experiments: Mapping[str, Experiment]


def load_config(raw: Any) -> Config:
    """Check the configuration as a whole.

    Args:
        raw: what config.yaml holds.

    Raises:
        UserError: every fault found, a line each: the key's path, the value, and the nearest valid name.
    """
    sections = validate(Sections, raw, "")
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

    def parse_experiment(name: str, data: dict[str, Any], where: str) -> Experiment:
        section = validate(ExperimentSection, data, where)
        wrong = _reference(f"{where}.dataset", section.dataset, sections.datasets)
        for modality, extractor in section.modalities.items():
            path = f"{where}.modalities.{modality}"
            wrong += _reference(path, extractor, sections.extractors)
            if extractor in extractors and extractors[extractor].modality != modality:
                fitting = [n for n, s in extractors.items() if s.modality == modality]
                wrong.append(
                    f"{path} = {extractor!r}: this extractor is of modality {extractors[extractor].modality!r}; "
                    f"of modality {modality!r} there are: {', '.join(sorted(fitting)) or 'none'}"
                )
        if wrong:
            raise UserError("\n".join(wrong))
        chosen = settings(section.preset, section.model, section.training, section.evaluation, where)
        modality_weights(chosen.model, list(section.modalities), f"{where}.model")
        return Experiment(
            section.dataset, section.modalities, section.preset, chosen.model, chosen.training, chosen.evaluation
        )

    experiments = _parse_each("experiments", sections.experiments, parse_experiment, faults)
    if faults:
        raise UserError("\n".join(faults))
    return Config(datasets, extractors, experiments)


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
            faults.append(f"{where}: a name is made of letters, digits, - and _, as it becomes part of a path")
            continue
        try:
            parsed[name] = parse(name, data, where)
        except UserError as error:
            faults.append(str(error))
    return parsed


def _reference(path: str, name: str, valid: Iterable[str]) -> list[str]:
    return [] if name in valid else [f"{path} = {name!r}: no such name{nearest(name, valid)}"]
