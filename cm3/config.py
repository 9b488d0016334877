"""Settings of the model, its training and its evaluation, with the presets `default` and `official`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from cm3.common.strict import Float, Strict, nearest, validate

__all__ = ["PRESETS", "Evaluation", "Model", "Settings", "Training", "modality_weights", "settings"]

Device = Literal["auto", "cpu", "cuda", "mps"]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[Float, Field(ge=0)]


class Neighbours(Strict):
    """How a model finds its item-item graphs."""

    knn_k: int = Field(10, gt=0, description="neighbours per item and modality in the item-item graph, itself included")
    knn_method: Literal["exact", "hnsw", "ivf"] = Field(
        "exact",
        description="search for those neighbours; hnsw and ivf are approximate and need faiss-cpu; ivf pays where vectors "
        "form groups, from some 50,000 items on, of wide vectors 200,000 (benchmarks/RESULTS.md); their recall stands in the "
        "stage's record",
    )
    knn_missing: Literal["drop", "mean"] = Field(
        "drop",
        description="an item without a vector has no neighbours and is none (drop), or has the mean of the others (mean)",
    )


class Weighted(Strict):
    """How a model weighs its modalities."""

    modality_weights: dict[str, Weight] | None = Field(
        None,
        description="weight of each modality, of its item-item graph in a model that has them, scaled to sum 1; "
        "null: image 0.1 and the others share 0.9, or all equal where there is no image or nothing else",
    )

    @field_validator("modality_weights")
    @classmethod
    def _some_weight(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and not sum(value.values()) > 0:
            raise ValueError("at least one modality needs a weight above 0")
        return value


def modality_weights(model: Weighted, modalities: Sequence[str], where: str = "model") -> dict[str, float]:
    """Return the weight of each modality's item-item graph, in the modalities' order, scaled to sum 1.

    Raises:
        UserError: the weights name a modality that the experiment lacks, or lack one that it has.
    """
    given = model.modality_weights
    if given is None:
        image = "image" in modalities and len(modalities) > 1
        rest = (0.9 if image else 1.0) / (len(modalities) - image)
        return {m: 0.1 if image and m == "image" else rest for m in modalities}
    path = f"{where}.modality_weights"
    for name in given:
        if name not in modalities:
            raise UserError(f"{path}.{name}: the experiment has no such modality{nearest(name, modalities)}")
    for name in modalities:
        if name not in given:
            raise UserError(f"{path}: modality {name!r} has no weight; give it one (0 leaves its graph out)")
    total = sum(given.values())
    return {m: given[m] / total for m in modalities}


class Model(Neighbours, Weighted):
    """The shape of CM3 and its loss."""

    embedding_dim: int = Field(
        64, gt=1, description="width d of one stream; a vector has one stream more than modalities"
    )
    hidden_factor: int = Field(4, gt=0, description="hidden width of the projections, in multiples of embedding_dim")
    n_ui_layers: int = Field(3, ge=0, description="layers L over the user-item graph")
    n_mm_layers: int = Field(1, ge=0, description="layers n over the item-item graph")
    item_graph: bool = Field(True, description="add an item's neighbours to it; false: an ablation")
    fusion: Literal["bezier", "linear", "mean", "concat"] = Field(
        "bezier",
        description="what makes the fused stream of the modalities' points: the curve on the sphere, or as ablations the "
        "curve through chords, their mean, or a linear map of all in a row; of unit norm in each case",
    )
    alpha: Float = Field(0.5, gt=0, description="t ~ Beta(alpha, alpha) mixes the modalities of each item in training")
    gamma: Float = Field(0.9, ge=0, description="weight of the uniformity losses")
    calibration: bool = Field(True, description="let similar items stay close; false: plain uniformity, an ablation")
    min_sim: Float = Field(0.0, ge=-1, le=1, description="lower clamp of the similarity that calibrates uniformity")
    max_sim: Float = Field(1.0, ge=-1, le=1, description="upper clamp of the similarity that calibrates uniformity")
    detach_similarity: bool = Field(
        False, description="whether the calibrating similarity is a constant to the gradient"
    )
    dedup_pairs: bool = Field(True, description="leave pairs of the same user or item out of the uniformity losses")
    uniformity_items: Literal["negative", "positive", "uniform"] = Field(
        "negative",
        description="items of the uniformity loss: sampled items the user has not bought, the batch's own, or any",
    )
    slerp: Literal["safe", "reference"] = Field(
        "safe", description="safe: defined for equal and opposite vectors; reference: sin/sin, NaN for equal vectors"
    )
    missing: Literal["mean", "zero"] = Field(
        "mean",
        description="the vector that stands for a missing one in the projections: the mean of the others, or zero",
    )
    dropout: Float = Field(0.0, ge=0, lt=1, description="must be 0: not implemented")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError("dropout is not implemented; leave it at 0")
        return value

    @model_validator(mode="after")
    def _ordered_clamp(self) -> "Model":
        if self.min_sim > self.max_sim:
            raise ValueError(f"min_sim {self.min_sim} is above max_sim {self.max_sim}")
        return self


class Training(Strict):
    """How the model is fitted."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"device", "processes", "checkpoint_seconds", "tensorboard"})

    seed: int = Field(42, ge=0, lt=2**32, description="of initial values, batches, negatives and mixing draws")
    epochs: int = Field(1000, gt=0, description="at most this many passes over the training interactions")
    batch_size: int = Field(
        2048, gt=1, description="interactions whose users and items a loss compares with one another"
    )
    batches_per_step: int = Field(
        1,
        gt=0,
        description="batches that share one propagation and one step: an epoch of a large data set then takes fewer "
        "propagations; see docs/training.md for what it does to accuracy",
    )
    warm_start: str | None = Field(
        None,
        description="folder with model.safetensors and user_embeddings.parquet of an earlier run, whose parameters this one "
        "starts from, and interactions.parquet, items.parquet and users.parquet that it learnt from; for data that have "
        "grown since (docs/growing-data.md)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of the products of features and weights; bfloat16 is faster where the processor or GPU has "
        "instructions for it, and halves the features' memory",
    )
    lr: Float = Field(1e-3, gt=0, description="step size of Adam")
    weight_decay: Float = Field(0.0, ge=0, description="L2 penalty that Adam adds to the gradient")
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant",
        description="how lr changes: not at all, by a cosine to 0 at the last of `epochs`, or by lr_decay an epoch",
    )
    lr_decay: Float = Field(0.99, gt=0, le=1, description="factor of lr an epoch; only with schedule: exponential")
    warmup_epochs: Float = Field(0.0, ge=0, description="epochs over which lr rises from 0, linearly")
    clip_norm: Float | None = Field(None, gt=0, description="largest norm of the gradient; larger ones are scaled down")
    patience: int = Field(
        10,
        gt=0,
        description="stop after this many validations in a row without improvement; of a baseline, 20 unless set",
    )
    validate_every: int = Field(1, gt=0, description="epochs between validations")
    monitor: str = Field(
        "recall@20", pattern=r"^(recall|ndcg)@[1-9]\d*$", description="recall@k or ndcg@k on the validation split"
    )
    select_on: Literal["valid", "test"] = Field(
        "valid",
        description="split whose score at the best validation epoch is recorded to compare settings by; "
        "test repeats the reference and makes its results optimistic: for replication only",
    )
    eval_embeddings: Literal["fresh", "last_batch"] = Field(
        "fresh", description="embeddings that are scored: a forward at t = 0.5, or what the epoch's last batch computed"
    )
    round_valid: int | None = Field(None, ge=0, le=15, description="digits kept of the monitored value; null: all")
    device: Device = Field("auto", description="auto takes CUDA, then MPS, then the CPU")
    processes: int = Field(
        1, gt=0, description="processes that share each batch, one per GPU; more is for cm3 alone (docs/training.md)"
    )
    checkpoint_seconds: Float = Field(
        30.0,
        ge=0,
        description="least time between checkpoints, of which large ones take a tenth at most; 0: after every step",
    )
    tensorboard: bool = Field(True, description="write TensorBoard curves beside the model, where it is installed")


class Evaluation(Strict):
    """How a trained model is measured."""

    ks: list[Positive] = Field([10, 20], min_length=1, description="cut-offs of the metrics")
    score: Literal["dot", "cosine"] = Field("dot", description="score of the main metrics; the other is reported too")
    mask: Literal["train", "train+valid"] = Field(
        "train", description="items kept out of a user's test ranking in the main metrics; the other is reported too"
    )
    top_n: int = Field(50, gt=0, description="recommendations written per test user")

    @field_validator("ks")
    @classmethod
    def _sorted_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("a cut-off stands here twice")
        return sorted(value)


WARM = {
    "model": "model.safetensors",
    "vectors": "user_embeddings.parquet",
    **{name: f"{name}.parquet" for name in ("interactions", "items", "users")},
}
"""Files of an earlier run, and of the data that it learnt from, by the names that training has for them."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"model": {}, "training": {}, "evaluation": {}},
    "official": {
        "model": {
            "slerp": "reference",
            "dedup_pairs": False,
            "detach_similarity": False,
            "uniformity_items": "negative",
            "knn_missing": "mean",
        },
        "training": {
            "select_on": "test",
            "eval_embeddings": "last_batch",
            "round_valid": 4,
            "patience": 11,
            "weight_decay": 0.0,
        },
        "evaluation": {"score": "dot", "mask": "train"},
    },
}
"""Values that stand where the user gives none. `official` repeats the reference implementation's arithmetic."""


@dataclass(frozen=True)
class Settings:
    """One experiment's validated settings."""

    preset: str
    model: Model
    training: Training
    evaluation: Evaluation


def settings(
    preset: str,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    where: str,
) -> Settings:
    """Return the user's values laid over a preset's, validated; `where` is the key path of the experiment.

    Raises:
        UserError: an unknown preset or key, a wrong type, an impossible value; the message holds the key's path.
    """
    if preset not in PRESETS:
        raise UserError(f"{where}.preset = {preset!r}: unknown preset{nearest(preset, PRESETS)}")
    base = PRESETS[preset]
    return Settings(
        preset,
        validate(Model, {**base["model"], **model}, f"{where}.model"),
        validate(Training, {**base["training"], **training}, f"{where}.training"),
        validate(Evaluation, {**base["evaluation"], **evaluation}, f"{where}.evaluation"),
    )
