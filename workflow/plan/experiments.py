"""Experiments: a dataset, one extractor per modality, a model, its training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from cm3.common.errors import UserError
from cm3.common.reduction import Reduction
from cm3.common.strict import Strict, nearest, validate
from cm3.config import Evaluation, Training
from cm3.model_registry import DEFAULT_MODEL, models, named_spec, spec_class, spec_classes
from cm3.model_spec import CLOSED_FORM_TRAINING, ModelSpec, Weighted, modality_weights

Kind = Literal["gaussian", "shuffled", "constant"]
"""Controls of `extractors.control` that replace features."""

PRESETS = tuple(dict.fromkeys(preset for spec in spec_classes().values() for preset in spec.presets))
"""Names of the presets of all models."""


class ExperimentSection(Strict):
    """One entry of `experiments`."""

    like: str | None = Field(
        None, description="name of another experiment, whose values are used for keys that this one does not set"
    )
    dataset: str = Field(description="a name under datasets")
    modalities: dict[str, str] = Field(
        default_factory=dict,
        description="modality -> extractor, in the order of fusion; empty for models that read no features. A modality has the "
        "name of its extractor's modality, or one of your own, such as title, so that several extractors of one modality "
        "can be used together",
    )
    control: Kind | dict[str, Kind] | None = Field(
        None,
        description="control that replaces the features of all modalities, or of some by modality: gaussian noise of equal "
        "norms, shuffled rows, or a constant vector; drawn with training.seed; item graphs are rebuilt from it",
    )
    reduce: dict[str, Reduction | None] = Field(
        default_factory=dict,
        description="reduction of the features of some modalities to fewer numbers, such as {image: {method: pca, dim: 512}}, in "
        "place of that of the extractor; null for a modality: its features as the extractor gives them",
    )
    preset: str = Field(
        "default",
        description="values of unset keys: default; official, which repeats the reference implementation of CM3; or best, "
        "which adds the words of the texts and re-ranks by co-occurrence and content (docs/reranking.md)",
        json_schema_extra={"enum": list(PRESETS)},
    )
    model: dict[str, Any] = Field(
        default_factory=dict, description="name of the model (cm3 by default) and its settings"
    )
    training: dict[str, Any] = Field(default_factory=dict, description="settings of training, over those of the preset")
    evaluation: dict[str, Any] = Field(
        default_factory=dict, description="settings of evaluation, over those of the preset"
    )

    @field_validator("control", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> Any:
        for kind in value.values() if isinstance(value, dict) else [value]:
            if isinstance(kind, str) and kind not in get_args(Kind):
                raise ValueError(f"no control {kind!r}{nearest(kind, get_args(Kind))}")
        return value


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: the values of its section over those of the preset.

    Attributes:
        modalities: extractor by modality, in the order of fusion.
        controls: control by modality, for those whose features are replaced.
        reductions: reduction by modality, for those whose features are reduced.
        split_seed: seed of a random split in place of the dataset's own; None for the dataset's own split.
    """

    dataset: str
    modalities: Mapping[str, str]
    preset: str
    model: ModelSpec
    training: Training
    evaluation: Evaluation
    controls: Mapping[str, Kind] = field(default_factory=dict)
    reductions: Mapping[str, Reduction] = field(default_factory=dict)
    split_seed: int | None = None

    @property
    def model_name(self) -> str:
        """Name of the model in the config."""
        return self.model.name

    def control(self, modality: str) -> str:
        """Return the control of a modality as in file names; '' for a modality that keeps its features."""
        kind = self.controls.get(modality)
        if kind is None or kind == "constant":
            return kind or ""
        return f"{kind}-{self.training.seed}"

    def reduction(self, modality: str) -> str:
        """Return the reduction of a modality as in file names; '' for a modality that is not reduced."""
        reduction = self.reductions.get(modality)
        return reduction.suffix if reduction else ""

    def feature_names(self) -> dict[str, str]:
        """Return the extractor of each modality with its reduction, such as clip-pca128, for people to read."""
        return {
            modality: "-".join(filter(None, (extractor, self.reduction(modality))))
            for modality, extractor in self.modalities.items()
        }

    def training_settings(self) -> dict[str, Any]:
        """Return the training settings that change the trained model."""
        if self.model.trains:
            return self.training.identity()
        return {"monitor": self.training.monitor}

    def training_identity(self) -> dict[str, Any]:
        """Return `training_settings` as they are in keys.

        A default of auto has the key of 1, which was the default before it, so that existing runs are up to date; 1 then has
        a key of its own. Earlier versions computed the pairs of the losses in float32 at a precision of bfloat16.
        """
        found = self.training_settings()
        default = self.model.presets[self.preset].get("training", {}).get("batches_per_step")
        if default == "auto" and found.get("batches_per_step") in ("auto", 1):
            found["batches_per_step"] = 1 if found["batches_per_step"] == "auto" else "1"
        if found.get("precision") == "bfloat16":
            found["precision"] = "bfloat16 of features and pairs"
        return found

    def with_seed(self, seed: int) -> "Experiment":
        """Return the experiment with another seed of training and controls."""
        return replace(self, training=self.training.model_copy(update={"seed": seed}))

    def on_split(self, seed: int | None) -> "Experiment":
        """Return the experiment on another random split of its dataset; None is the dataset's own."""
        return replace(self, split_seed=seed)


def inherit(name: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return an entry of `experiments` with the keys that it does not set from the entry that `like` names.

    `model`, `training` and `evaluation` are inherited key by key, other sections whole. From an entry with another model,
    the preset and the model settings are not inherited, nor training settings with a default of the model's own, nor
    modalities, controls, reductions and training settings that the model does not support.

    Raises:
        UserError: no such entry, or a circle of entries.
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
    before = _model(base).get("name", DEFAULT_MODEL)
    model = _model(own).get("name", before)
    inherited = dict(base)
    if model != before:
        inherited = {key: value for key, value in base.items() if key not in ("model", "preset")}
        if model in models():
            inherited = _supported(inherited, spec_class(model), spec_class(before) if before in models() else None)
    merged = {**inherited, **own}
    for key in ("model", "training", "evaluation"):
        if isinstance(inherited.get(key), dict) and isinstance(own.get(key), dict):
            merged[key] = {**inherited[key], **own[key]}
    return merged


def _model(section: Mapping[str, Any]) -> Mapping[str, Any]:
    model = section.get("model")
    return model if isinstance(model, dict) else {}


def _supported(section: Mapping[str, Any], model: type[ModelSpec], before: type[ModelSpec] | None) -> dict[str, Any]:
    unused = () if model.reads_features else ("modalities", "control", "reduce")
    kept = {key: value for key, value in section.items() if key not in unused}
    if isinstance(kept.get("training"), dict):
        # A value chosen for one model, such as its patience, would stop another one too early or too late.
        own = {*model.training_defaults, *(before.training_defaults if before else ())}
        kept["training"] = {
            key: value for key, value in kept["training"].items() if key not in own and model.supports(key)
        }
    return kept


def parse_settings(section: ExperimentSection, where: str) -> Experiment:
    """Return the experiment of a section. The caller checks that its dataset and extractors exist.

    Raises:
        UserError: an unknown model, preset or key, an impossible value, or settings that the model does not support.
    """
    spec = named_spec(section.model, f"{where}.model")
    preset = _preset(spec, section.preset, where)
    defaults = {**spec.training_defaults, **preset.get("training", {})}
    chosen = Experiment(
        section.dataset,
        section.modalities,
        section.preset,
        validate(spec, {**preset.get("model", {}), **section.model}, f"{where}.model"),
        _training(spec, {**defaults, **section.training}, f"{where}.training"),
        validate(Evaluation, {**preset.get("evaluation", {}), **section.evaluation}, f"{where}.evaluation"),
        _controls(section, where),
    )
    check(chosen, where)
    return chosen


def _preset(spec: type[ModelSpec], preset: str, where: str) -> Mapping[str, Mapping[str, Any]]:
    if preset in spec.presets:
        return spec.presets[preset]
    path = f"{where}.preset = {preset!r}"
    if preset not in PRESETS:
        raise UserError(f"{path}: unknown preset{nearest(preset, PRESETS)}")
    others = [name for name, other in spec_classes().items() if preset in other.presets]
    raise UserError(f"{path}: a preset of {', '.join(others)}, but the model is {_name(spec)}")


def _name(spec: type[ModelSpec]) -> str:
    return str(spec.model_fields["name"].default)


def check(experiment: Experiment, where: str) -> None:
    """Check that an experiment's parts fit each other.

    Raises:
        UserError: modalities that the model lacks or does not read, weights of other modalities, or a cosine score of a
            model without embeddings.
    """
    model, name, modalities = experiment.model, experiment.model_name, dict(experiment.modalities)
    path = f"{where}.modalities = {modalities}"
    if model.reads_features and not modalities:
        raise UserError(f"{path}: {name} reads features and needs at least 1 modality, such as {{text: EXTRACTOR}}")
    if modalities and not model.reads_features:
        raise UserError(f"{path}: {name} reads no features; remove its modalities")
    if experiment.evaluation.score == "cosine" and model.exports != "embeddings":
        raise UserError(
            f"{where}.evaluation.score = 'cosine': {name} exports item weights and no embeddings; set score to dot"
        )
    if isinstance(model, Weighted):
        modality_weights(model, list(modalities), f"{where}.model")


def _training(spec: type[ModelSpec], given: Mapping[str, Any], where: str) -> Training:
    chosen = validate(Training, dict(given), where)
    for key in given:
        if not spec.supports(key):
            raise UserError(f"{where}.{key}: {_unsupported(spec, key)}")
    return chosen


def _unsupported(spec: type[ModelSpec], key: str) -> str:
    if not spec.trains:
        supported = " and ".join(sorted(CLOSED_FORM_TRAINING))
        return f"{_name(spec)} is computed in closed form and does not train; it supports only {supported}"
    others = [name for name, other in spec_classes().items() if other.trains and other.supports(key)]
    return f"not supported by {_name(spec)}, only by {', '.join(others)}"


def _controls(section: ExperimentSection, where: str) -> dict[str, Kind]:
    if section.control is None:
        return {}
    if not section.modalities and section.model.get("name") == "rerank":
        raise UserError(
            f"{where}.control = {section.control!r}: a re-ranking has no features to replace; give this control to an experiment "
            "of CM3, and re-rank that, as in {like: it, preset: best}"
        )
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
