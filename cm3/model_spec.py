"""Base class of every model: its settings, and what the pipeline must know of it. Imports no torch and no NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cm3.common.errors import UserError
from cm3.common.parts import Part
from cm3.common.strict import Float, Strict, nearest

__all__ = ["Estimate", "ItemGraphs", "ModelSpec", "Sizes", "Weighted", "modality_weights"]

OPTIONAL_TRAINING = frozenset({"precision", "processes", "warm_start", "cuda_graph"})
"""Keys of `training` that a trained model supports only if its spec names them."""

CLOSED_FORM_TRAINING = frozenset({"monitor", "device"})
"""Keys of `training` that a model in closed form supports."""

MEGABYTE = 1e6
Weight = Annotated[Float, Field(ge=0)]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data that an estimate is made for.

    Attributes:
        users, items, interactions: counts.
        features: rows and width of each modality's vectors.
        exported_mb: size in MB of the model's embeddings or item weights; 0 if they do not exist yet.
    """

    users: int
    items: int
    interactions: int
    features: Sequence[tuple[int, int]] = ()
    exported_mb: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Memory in MB (10^6 bytes) and wall time in minutes of one job."""

    memory_mb: float
    minutes: float


class ModelSpec(Part, Strict):
    """The settings of one model. `cm3.model_registry` lists the subclasses.

    Attributes:
        stage: name in `cm3.common.stages.STAGES` of the stage that trains it.
        reads_features: needs extractors for its modalities; otherwise it accepts none.
        reads_item_graphs: reads the similarity files of its modalities.
        trains: fitted by gradient descent with the `training` settings; otherwise computed in closed form.
        on_device: computes on `training.device`; otherwise on the CPU alone, and its job asks for no GPU.
        exports: what scores are computed from: user and item embeddings, or item weights W with scores history @ W; lists: the
            lists themselves, from the files of other models.
        optional_training: the keys of `OPTIONAL_TRAINING` that it supports.
        table_copies: tables of users and items that fit into the memory which a training asks for.
        training_defaults: defaults of `training` that differ from those of `cm3.config.Training`.
        presets: preset -> section (model, training, evaluation) -> values for keys that the user does not set.
    """

    stage: ClassVar[str]
    reads_features: ClassVar[bool] = False
    reads_item_graphs: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    on_device: ClassVar[bool] = True
    exports: ClassVar[Literal["embeddings", "item_weights", "lists"]] = "embeddings"
    optional_training: ClassVar[frozenset[str]] = frozenset()
    table_copies: ClassVar[float] = 16
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {"default": {}}

    name: str

    @classmethod
    def supports(cls, key: str) -> bool:
        """Return whether a key of `training` has an effect on this model."""
        if not cls.trains:
            return key in CLOSED_FORM_TRAINING
        return key not in OPTIONAL_TRAINING or key in cls.optional_training

    def training_estimate(self, sizes: Sizes, *, epochs: int, batch_size: int) -> Estimate:
        """Return what training needs at most.

        Memory: features, the embedding tables with gradients and Adam's moments, the interactions and their graph.
        Time: by epochs and steps; half an hour for a closed form.
        """
        features = sum(rows * dim * 4 / MEGABYTE for rows, dim in sizes.features)
        memory = 2500 + 2 * features + self.table_copies * self.table_mb(sizes) + sizes.interactions * 100 / MEGABYTE
        if not self.trains:
            return Estimate(memory, 30)
        steps = sizes.interactions / batch_size + 1
        values = sum(rows * dim for rows, dim in sizes.features)
        step_seconds = 2.2e-6 * sizes.interactions + 5e-9 * values + 0.05
        return Estimate(memory, 30 + epochs * steps * step_seconds / 60)

    def table_mb(self, sizes: Sizes) -> float:
        """Return the size in MB of a table of users and items, with a stream for each modality and one more."""
        width = getattr(self, "embedding_dim", 64) * (len(sizes.features) + 1)
        return (sizes.users + sizes.items) * width * 4 / MEGABYTE

    def evaluation_estimate(self, sizes: Sizes) -> Estimate:
        """Return what evaluation needs at most: what the model exports, a block of scores, some 100 items per user."""
        exported = sizes.exported_mb or self.exported_mb(sizes)
        copies = 4 if self.exports == "embeddings" else 1.5
        rows = sizes.interactions * 100 + sizes.users * 6000
        return Estimate(2000 + copies * exported + rows / MEGABYTE, 15 + sizes.users * sizes.items / 1e9)

    def exported_mb(self, sizes: Sizes) -> float:
        """Return the size in MB of embeddings of width 256; 0 for item weights, whose sparse rows are small."""
        return (sizes.users + sizes.items) * 256 * 4 / MEGABYTE if self.exports == "embeddings" else 0.0


class ItemGraphs(Strict):
    """Settings of the item-item graphs that a model reads."""

    knn_k: int = Field(10, gt=0, description="neighbours per item and modality in the item-item graph, itself included")
    knn_method: Literal["exact", "hnsw", "ivf"] = Field(
        "exact",
        description="search for these neighbours; ivf and hnsw are approximate; ivf, which searches cells of similar vectors, is "
        "much faster than exact from some 100,000 items on (benchmarks/RESULTS.md); hnsw needs faiss-cpu; the record of the "
        "stage has the recall of the search",
    )
    knn_missing: Literal["drop", "mean"] = Field(
        "drop",
        description="items without a vector: no neighbours, and not a neighbour of others (drop), or the mean of the other "
        "vectors (mean)",
    )


class Weighted(Strict):
    """Weights of a model's modalities.

    Attributes:
        image_share: default weight of the image modality next to others.
    """

    image_share: ClassVar[float] = 0.1

    modality_weights: dict[str, Weight] | None = Field(
        None,
        description="weight of each modality, or of its item-item graph if the model reads graphs, scaled to sum 1; "
        "null: 0.1 for image and equal shares of 0.9 for the others; equal shares without image or with image alone",
    )

    @field_validator("modality_weights")
    @classmethod
    def _some_weight(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and not sum(value.values()) > 0:
            raise ValueError("at least one modality needs a weight above 0")
        return value


def modality_weights(model: Weighted, modalities: Sequence[str], where: str = "model") -> dict[str, float]:
    """Return the weight of each modality, in the order of `modalities`, scaled to sum 1.

    Raises:
        UserError: the weights name a modality that the experiment lacks, or lack one that it has.
    """
    given = model.modality_weights
    if given is None:
        image = "image" in modalities and len(modalities) > 1
        rest = (1 - model.image_share if image else 1.0) / (len(modalities) - image)
        return {m: model.image_share if image and m == "image" else rest for m in modalities}
    path = f"{where}.modality_weights"
    for name in given:
        if name not in modalities:
            raise UserError(f"{path}.{name}: the experiment has no such modality{nearest(name, modalities)}")
    for name in modalities:
        if name not in given:
            raise UserError(f"{path}: modality {name!r} has no weight; give it one (0 leaves it out)")
    total = sum(given.values())
    return {m: given[m] / total for m in modalities}
