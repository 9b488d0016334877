"""Settings of CM3, of training and of evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from cm3.common.strict import Float, Strict, nearest, validate
from cm3.model_spec import ItemGraphs, ModelSpec, Weighted, modality_weights

__all__ = ["WARM", "Evaluation", "Model", "Settings", "Training", "modality_weights", "settings"]

Device = Literal["auto", "cpu", "cuda", "mps"]
Positive = Annotated[int, Field(gt=0)]


class Model(ModelSpec, ItemGraphs, Weighted):
    """CM3: spherical fusion of modalities, graph propagation, alignment and calibrated uniformity losses.

    The preset `official` repeats the arithmetic of the reference implementation.
    """

    stage: ClassVar[str] = "train"
    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "torch")
    reads_features: ClassVar[bool] = True
    reads_item_graphs: ClassVar[bool] = True
    optional_training: ClassVar[frozenset[str]] = frozenset({"precision", "processes", "warm_start", "cuda_graph"})
    table_copies: ClassVar[float] = 9
    presets: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "default": {"training": {"batches_per_step": "auto"}},
        # the workflow adds a re-ranking: workflow/plan/best.py
        "best": {"training": {"batches_per_step": "auto"}},
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

    name: Literal["cm3"] = "cm3"
    embedding_dim: int = Field(
        64, gt=1, description="width d of one stream; a vector has one stream per modality and a fused one"
    )
    hidden_factor: int = Field(4, gt=0, description="hidden width of the projections, in multiples of embedding_dim")
    n_ui_layers: int = Field(3, ge=0, description="layers L over the user-item graph")
    n_mm_layers: int = Field(1, ge=0, description="layers n over the item-item graph")
    item_graph: bool = Field(True, description="add the propagated neighbours of an item to it; false: an ablation")
    fusion: Literal["bezier", "linear", "mean", "concat"] = Field(
        "bezier",
        description="fusion of the modalities' points into one, of unit norm: a Bezier curve on the sphere, or as "
        "ablations the same curve through chords, the mean of the points, or a linear map of their concatenation",
    )
    alpha: Float = Field(0.5, gt=0, description="t ~ Beta(alpha, alpha) mixes the modalities of each item in training")
    gamma: Float = Field(0.9, ge=0, description="weight of the uniformity losses")
    calibration: bool = Field(
        True, description="weaker uniformity between similar items; false: plain uniformity, an ablation"
    )
    min_sim: Float = Field(0.0, ge=-1, le=1, description="lower clamp of the similarity that calibrates uniformity")
    max_sim: Float = Field(1.0, ge=-1, le=1, description="upper clamp of the similarity that calibrates uniformity")
    detach_similarity: bool = Field(False, description="stop the gradient through the calibrating similarity")
    dedup_pairs: bool = Field(True, description="exclude pairs of the same user or item from the uniformity losses")
    uniformity_items: Literal["negative", "positive", "uniform"] = Field(
        "negative",
        description="items of the uniformity loss: sampled negatives of the user, the items of the batch, or items sampled "
        "uniformly",
    )
    slerp: Literal["safe", "fused", "reference"] = Field(
        "safe",
        description="spherical interpolation; safe: defined for equal and opposite vectors; fused: equal to it up to "
        "rounding, in fewer passes and kernel launches; reference: sin/sin, NaN for equal vectors",
    )
    missing: Literal["mean", "zero"] = Field(
        "mean",
        description="input of the projections for an item without a vector: the mean of the other vectors, or zero",
    )
    dropout: Float = Field(0.0, ge=0, lt=1, description="must be 0: not implemented")

    def identity(self) -> dict[str, Any]:
        """Return the settings without the name: the keys of existing runs were computed without it."""
        return {key: value for key, value in super().identity().items() if key != "name"}

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
    """Optimisation, validation and early stopping of a trained model."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "device",
            "processes",
            "gpu_share",
            "cuda_graph",
            "optimizer_state",
            "checkpoint_seconds",
            "tensorboard",
            "trackers",
        }
    )

    seed: int = Field(
        42, ge=0, lt=2**32, description="seed of initial values, batches, negative samples and mixing coefficients"
    )
    epochs: int = Field(1000, gt=0, description="maximum number of passes over the training interactions")
    batch_size: int = Field(2048, gt=1, description="interactions per batch; the losses compare them with one another")
    batches_per_step: Positive | Literal["auto"] = Field(
        1,
        description="batches per propagation and optimiser step; larger values save propagations on large data sets; "
        "auto: 1 below 200,000 interactions, then as many as leave some 50 steps an epoch, so that its time grows in "
        "proportion to the data; the default of cm3 is auto, that of its preset official and of baselines 1; "
        "docs/training.md shows the effect on accuracy",
    )
    warm_start: str | None = Field(
        None,
        description="folder of an earlier run to take initial parameters from: model.safetensors and "
        "user_embeddings.parquet, with interactions.parquet, items.parquet and users.parquet that it was trained on; for "
        "data that have grown since (docs/growing-data.md)",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="type of the large products; bfloat16: those of features and weights, and of the pairs of a batch, which "
        "is faster on a CPU or GPU that has instructions for it, and halves the memory of the features; tf32: float32 "
        "features, products of features and weights with a mantissa of ten bits on NVIDIA GPUs from Ampere on, float32 "
        "elsewhere",
    )
    lr: Float = Field(1e-3, gt=0, description="step size of Adam")
    weight_decay: Float = Field(0.0, ge=0, description="L2 penalty that Adam adds to the gradient")
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant",
        description="schedule of lr: constant, cosine (to 0 at the last of `epochs`), or exponential (times lr_decay per "
        "epoch)",
    )
    lr_decay: Float = Field(0.99, gt=0, le=1, description="factor of lr per epoch; only for schedule: exponential")
    warmup_epochs: Float = Field(0.0, ge=0, description="epochs over which lr rises linearly from 0")
    clip_norm: Float | None = Field(None, gt=0, description="maximum norm of the gradient; null: no clipping")
    patience: int = Field(
        10,
        gt=0,
        description="stop after this many validations in a row without improvement; the default of trained baselines is 20",
    )
    validate_every: int = Field(1, gt=0, description="epochs between validations")
    monitor: str = Field(
        "recall@20", pattern=r"^(recall|ndcg)@[1-9]\d*$", description="recall@k or ndcg@k on the validation split"
    )
    select_on: Literal["valid", "test"] = Field(
        "valid",
        description="split whose score at the best validation epoch is recorded for comparing settings; test repeats the "
        "reference and makes its results optimistic: for replication only",
    )
    eval_embeddings: Literal["fresh", "last_batch"] = Field(
        "fresh",
        description="embeddings that are scored: of a forward pass at t = 0.5, or of the last batch of the epoch",
    )
    round_valid: int | None = Field(None, ge=0, le=15, description="digits kept of the monitored value; null: all")
    device: Device = Field("auto", description="auto: CUDA if available, then MPS, then the CPU")
    processes: int = Field(
        1, gt=0, description="data-parallel processes that split each batch, one per GPU; cm3 only (docs/training.md)"
    )
    gpu_share: Float = Field(
        1.0,
        ge=0.05,
        le=1,
        description="part of a GPU that the job takes: at 0.25 four trainings run on one GPU of this machine at a time; a "
        "cluster gives each a GPU of its own (docs/gpu.md)",
    )
    cuda_graph: bool | Literal["auto"] = Field(
        False,
        description="capture a training step on an NVIDIA GPU as a CUDA graph, which saves the time of launching hundreds of "
        "kernels; cm3 with one process only; auto: without a graph where it cannot be captured; true: an error there; not "
        "yet tried on a GPU (docs/gpu.md)",
    )
    optimizer_state: Literal["memory", "disk"] = Field(
        "memory",
        description="place of the two moments of Adam on the CPU; disk: temporary files in TMPDIR, which the operating system "
        "writes and reads where memory is short; the results are the same bytes (docs/training.md)",
    )
    checkpoint_seconds: Float = Field(
        30.0,
        ge=0,
        description="minimum time between checkpoints; writing takes a tenth of the time at most; 0: after every step",
    )
    tensorboard: bool = Field(
        True, description="write TensorBoard curves next to the model, if TensorBoard is installed"
    )
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        [], description="experiment trackers that training also reports to; their libraries are installed separately"
    )


class Evaluation(Strict):
    """Metrics, masking and recommendation lists."""

    ks: list[Positive] = Field([10, 20], min_length=1, description="cut-offs of the metrics")
    score: Literal["dot", "cosine"] = Field(
        "dot", description="score of the main metrics; metrics.json also has those of the other, see also_report"
    )
    mask: Literal["train", "train+valid"] = Field(
        "train",
        description="items excluded from a user's test ranking in the main metrics; metrics.json also has those of the "
        "other mask",
    )
    top_n: int = Field(50, gt=0, description="recommendations written per test user")
    also_report: list[Literal["dot", "cosine"]] | None = Field(
        None,
        description="further scores whose metrics metrics.json has; null: the other score, too; []: none, which halves the "
        "time of an evaluation",
    )

    def identity(self) -> dict[str, Any]:
        """Return the settings, also_report only where it is set: the keys of existing runs were computed without it."""
        found = super().identity()
        return found if self.also_report is not None else {k: v for k, v in found.items() if k != "also_report"}

    @field_validator("ks")
    @classmethod
    def _sorted_unique(cls, value: list[int]) -> list[int]:
        repeated = sorted({k for k in value if value.count(k) > 1})
        if repeated:
            raise ValueError(f"duplicate cut-off in ks: {', '.join(map(str, repeated))}")
        return sorted(value)


WARM = {
    "model": "model.safetensors",
    "vectors": "user_embeddings.parquet",
    **{name: f"{name}.parquet" for name in ("interactions", "items", "users")},
}
"""Files of an earlier run and of its training data, by the input names of the training stage."""


@dataclass(frozen=True)
class Settings:
    """Validated settings of CM3, its training and its evaluation."""

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
    """Return a preset of CM3 with the user's values over it, validated; `where` is the key path of the experiment.

    Raises:
        UserError: an unknown preset or key, a wrong type, or a value out of range; the message has the key path.
    """
    if preset not in Model.presets:
        raise UserError(f"{where}.preset = {preset!r}: unknown preset{nearest(preset, Model.presets)}")
    base = Model.presets[preset]
    return Settings(
        preset,
        validate(Model, {**base.get("model", {}), **model}, f"{where}.model"),
        validate(Training, {**base.get("training", {}), **training}, f"{where}.training"),
        validate(Evaluation, {**base.get("evaluation", {}), **evaluation}, f"{where}.evaluation"),
    )
