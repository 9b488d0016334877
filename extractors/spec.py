"""Base of the backends' settings: the config keys that all extractors share, keys, inputs and cost estimate."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cm3.common.parts import Part
from cm3.common.reduction import Reduction
from cm3.common.strict import Strict

if TYPE_CHECKING:
    from extractors.extractor import Model
    from extractors.runtime.source import Source

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Valid names of extractors and modalities: they become parts of file names."""


@dataclass(frozen=True)
class Cost:
    """Estimated memory and speed of one backend, from which a job's requests to a cluster are computed.

    Attributes:
        memory_mb: memory without weights, in MB (10^6 bytes).
        weights_mb: memory of the weights in MB, used where neither a local file nor the model's name gives their size.
        items_per_second: with 8 CPU threads; on a small GPU for models that are too slow on a CPU.
        bytes_per_item: memory that grows with the number of items, besides the finished vectors.
    """

    memory_mb: float
    weights_mb: float
    items_per_second: float
    bytes_per_item: int = 0


class BackendSpec(Strict, Part):
    """Settings of one extractor, and the facts about its backend. Each backend adds its own fields and methods.

    Attributes:
        modalities: modalities that the backend supports; empty: any.
        shard_items: default number of items per shard; None: a single shard.
        cached: whether outputs are added to the cache; False for backends that only look vectors up.
        cost: estimated memory and speed.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"batch_size", "device", "workers", "shard_size"})
    modalities: ClassVar[tuple[str, ...]] = ()
    shard_items: ClassVar[int | None] = 2048
    cached: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(6000, 8000, 1)

    modality: str = Field(description="Name of the modality of the vectors.")
    backend: str = Field(description="Implementation of the extractor.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Number format of the stored vectors.")
    batch_size: int | None = Field(None, gt=0, description="Inputs per forward pass; default: chosen for the device.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device that runs the model; auto: a GPU if there is one."
    )
    workers: int | None = Field(
        None, ge=0, description="Threads or processes that decode images; default: one per thread of the job."
    )
    shard_size: int | None = Field(
        None, gt=0, description="Items per shard: an interrupted job resumes after its last finished shard."
    )
    reduce: Reduction | None = Field(
        None,
        description="Reduction of the vectors to fewer numbers, after the extraction, which a change does not repeat; an "
        "experiment's `reduce` goes before it.",
    )

    @field_validator("modality")
    @classmethod
    def _modality_of_backend(cls, value: str) -> str:
        if cls.modalities and value not in cls.modalities:
            supported = " or ".join(cls.modalities)
            raise ValueError(f"this backend supports {supported}; set modality: {cls.modalities[0]}")
        if not NAME.fullmatch(value):
            raise ValueError("a modality is part of file names: use letters, digits, '.', '_' and '-' only")
        return value

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output, without paths and without fields that are None.

        Nor is `reduce` among them, which is a stage of its own (`extractors.reduce`).
        """
        return self.model_dump(mode="json", exclude={*self.runtime_fields, "reduce"}, exclude_none=True)

    def identity(self) -> dict[str, Any]:
        """Return the settings and the model's identity: the features' key is a hash of it.

        Raises:
            UserError: local weights or a package named by the spec do not exist.
        """
        return self.settings() | self.model_identity()

    def model_identity(self) -> dict[str, Any]:
        """Return digests or versions that identify the model where the settings alone do not."""
        return {}

    def items_per_shard(self) -> int | None:
        """Return the number of items per shard; None: a single shard."""
        return self.shard_size or self.shard_items

    def modules(self) -> list[str]:
        """Return the modules whose code determines the output, besides the stage's entry module."""
        return [type(self).__module__]

    def needs(self) -> set[str]:
        """Return the names of the job's inputs, out of items, manifest, reviews, interactions and vectors."""
        return {"items"}

    def inputs_per_item(self) -> int:
        """Return the largest number of inputs of the model per item, for estimates of time."""
        return 1

    def uses_gpu(self) -> bool:
        """Return whether a job should request a GPU."""
        return self.device != "cpu"

    def gpus(self) -> int:
        """Return the number of GPUs that a job requests."""
        return 1 if self.uses_gpu() else 0

    def memory_mb(self, items: int) -> float:
        """Return the estimated memory of a job over `items` items in MB (10^6 bytes)."""
        return self.cost.memory_mb + self.weights_mb() + self.cost.bytes_per_item * items / 1e6 + items / 100

    def weights_mb(self) -> float:
        """Return the estimated memory of the weights in MB (10^6 bytes)."""
        return self.cost.weights_mb

    def read(self, inputs: Mapping[str, Path]) -> "Source[Any]":
        """Return the model's inputs, read from the job's input files. Loads no model."""
        raise NotImplementedError

    def named_parameters(self) -> int:
        """Return the number of parameters that the model's name states, such as 7B; 0 if it states none."""
        return 0

    def cpu_hours(self, parameters: int, items: int) -> float | None:
        """Return the estimated hours of `items` items on this CPU; None if the backend has no estimate."""
        return None

    def check_cpu_time(self, items: int) -> None:
        """Log a warning if `items` items take long on this machine; raise a UserError if they take hours."""

    def load(self) -> "Model[Any]":
        """Load the model and return the extractor."""
        raise NotImplementedError
