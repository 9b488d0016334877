"""Experiments: a dataset, one extractor per modality, a model, its training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from cm3.baselines.config import PATIENCE
from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest, validate
from cm3.config import PRESETS, Evaluation, Training, modality_weights
from workflow.plan.models import CM3, NAMES, ModelSettings, Traits, name_of, parse_model, traits

Kind = Literal["gaussian", "shuffled", "constant"]
"""What `extractors.control` can put in place of features."""

CLOSED_FORM = frozenset({"monitor", "device"})
"""What a model in closed form takes of `training`."""

CM3_ALONE = frozenset({"precision", "processes", "warm_start"})
"""What of `training` only CM3 heeds."""


class ExperimentSection(Strict):
    """One entry of `experiments`."""

    like: str | None = Field(None, description="another experiment, whose values stand where this one gives none")
    dataset: str = Field(description="a name under datasets")
    modalities: dict[str, str] = Field(
        default_factory=dict,
        description="modality -> extractor, in the order of fusion; none for models that read no features",
    )
    control: Kind | dict[str, Kind] | None = Field(
        None,
        description="in place of all features, or of a modality's: gaussian noise of equal norms, the rows shuffled, or a "
        "constant vector; drawn from training.seed, and the item graphs built anew",
    )
    preset: Literal["default", "official"] = Field("default", description="where unset values come from")
    model: dict[str, Any] = Field(
        default_factory=dict, description="name of the model (cm3 by default), and overrides of its settings"
    )
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's training")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's evaluation")

    @field_validator("control", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> Any:
        for kind in value.values() if isinstance(value, dict) else [value]:
            if isinstance(kind, str) and kind not in get_args(Kind):
                raise ValueError(f"there is no control {kind!r}{nearest(kind, get_args(Kind))}")
        return value


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: the preset's values with the section's own over them."""

    dataset: str
    modalities: Mapping[str, str]
    preset: str
    model: ModelSettings
    training: Training
    evaluation: Evaluation
    controls: Mapping[str, Kind] = field(default_factory=dict)
    """What stands in place of a modality's features."""

    @property
    def model_name(self) -> str:
        """The name that the config gives the model."""
        return name_of(self.model)

    @property
    def traits(self) -> Traits:
        """What the model reads and leaves behind."""
        return traits(self.model_name)

    def control(self, modality: str) -> str:
        """Return the control of a modality as file names carry it, '' where its own features are read."""
        kind = self.controls.get(modality)
        if kind is None or kind == "constant":
            return kind or ""
        return f"{kind}-{self.training.seed}"

    def training_identity(self) -> dict[str, Any]:
        """Return the training settings that decide the model."""
        if self.traits.trains:
            return self.training.identity()
        return {"monitor": self.training.monitor}

    def with_seed(self, seed: int) -> "Experiment":
        """Return the experiment with another seed of training and controls."""
        return replace(self, training=self.training.model_copy(update={"seed": seed}))


def inherit(name: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return an entry of `experiments` with what it does not set taken from the one that it is `like`.

    `model`, `training` and `evaluation` are taken key by key, all else whole. From an entry with another model, neither
    preset nor model settings are taken, nor its patience, nor what this model has no use for of modalities, controls and
    training.

    Raises:
        UserError: no such entry, or entries that are like each other.
    """
    lineage = [name]
    while (like := entries[lineage[-1]].get("like")) is not None:
        where = f"experiments.{lineage[-1]}.like = {like!r}"
        if not isinstance(like, str) or like not in entries:
            raise UserError(f"{where}: no such name{nearest(str(like), entries)}")
        if like in lineage:
            raise UserError(f"{where}: experiments are like each other in a circle: {', '.join([*lineage, like])}")
        lineage.append(like)
    merged: dict[str, Any] = {}
    for ancestor in reversed(lineage):
        merged = _laid_over(merged, entries[ancestor])
    return merged


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    model = _model(own).get("name", _model(base).get("name", CM3))
    taken = dict(base)
    if model != _model(base).get("name", CM3):
        taken = {key: value for key, value in base.items() if key not in ("model", "preset")}
        if model in NAMES:
            taken = _of_use(taken, model)
    merged = {**taken, **own}
    for key in ("model", "training", "evaluation"):
        if isinstance(taken.get(key), dict) and isinstance(own.get(key), dict):
            merged[key] = {**taken[key], **own[key]}
    return merged


def _model(section: Mapping[str, Any]) -> Mapping[str, Any]:
    model = section.get("model")
    return model if isinstance(model, dict) else {}


def _of_use(section: Mapping[str, Any], model: str) -> dict[str, Any]:
    useless = () if traits(model).content else ("modalities", "control")
    kept = {key: value for key, value in section.items() if key not in useless}
    if isinstance(kept.get("training"), dict):
        # Models plateau for unlike times: another one's patience would stop this one too early, or late.
        kept["training"] = {
            key: value for key, value in kept["training"].items() if key != "patience" and not _unheeded(key, model)
        }
    return kept


def _unheeded(key: str, model: str) -> str:
    """Return why a model does not heed a key of `training`, or nothing."""
    if not traits(model).trains and key not in CLOSED_FORM:
        return f"{model} is computed in closed form and does not train; of this section it takes {' and '.join(sorted(CLOSED_FORM))} only"
    return f"{CM3} alone heeds it, but the model is {model}" if model != CM3 and key in CM3_ALONE else ""


def parse_settings(section: ExperimentSection, where: str) -> Experiment:
    """Return a section's experiment. Whether its dataset and extractors exist is for the caller to check.

    Raises:
        UserError: an unknown model or key, an impossible value, or settings that the model has no use for.
    """
    model = parse_model(section.model, section.preset, f"{where}.model")
    name = name_of(model)
    if section.preset != "default" and name != CM3:
        raise UserError(f"{where}.preset = {section.preset!r}: this preset is of {CM3}, but the model is {name}")
    base = PRESETS[section.preset]
    patience = {"patience": PATIENCE} if name != CM3 and traits(name).trains else {}
    chosen = Experiment(
        section.dataset,
        section.modalities,
        section.preset,
        model,
        _training(name, {**base["training"], **patience, **section.training}, f"{where}.training"),
        validate(Evaluation, {**base["evaluation"], **section.evaluation}, f"{where}.evaluation"),
        _controls(section, where),
    )
    check(chosen, where)
    return chosen


def check(experiment: Experiment, where: str) -> None:
    """Check that an experiment's parts fit each other.

    Raises:
        UserError: modalities that the model lacks or has no use for, weights of other modalities, or a cosine of a model
            that has no embeddings.
    """
    name, modalities = experiment.model_name, dict(experiment.modalities)
    path = f"{where}.modalities = {modalities}"
    if experiment.traits.content and not modalities:
        raise UserError(f"{path}: {name} reads features and needs at least 1 modality, such as {{text: EXTRACTOR}}")
    if modalities and not experiment.traits.content:
        raise UserError(f"{path}: {name} reads no features; leave its modalities out")
    if experiment.evaluation.score == "cosine" and not experiment.traits.embeddings:
        raise UserError(
            f"{where}.evaluation.score = 'cosine': {name} leaves item weights and no embeddings to take it of; set dot"
        )
    model: Any = experiment.model
    if hasattr(model, "modality_weights"):
        modality_weights(model, list(modalities), f"{where}.model")


def _training(model: str, given: Mapping[str, Any], where: str) -> Training:
    chosen = validate(Training, dict(given), where)
    for key in given:
        if why := _unheeded(key, model):
            raise UserError(f"{where}.{key}: {why}")
    return chosen


def _controls(section: ExperimentSection, where: str) -> dict[str, Kind]:
    if section.control is None:
        return {}
    if isinstance(section.control, str):
        if not section.modalities:
            raise UserError(f"{where}.control = {section.control!r}: there are no features to replace; give modalities")
        return dict.fromkeys(section.modalities, section.control)
    for modality in section.control:
        if modality not in section.modalities:
            raise UserError(
                f"{where}.control.{modality}: the experiment has no such modality{nearest(modality, section.modalities)}"
            )
    return {modality: section.control[modality] for modality in section.modalities if modality in section.control}
