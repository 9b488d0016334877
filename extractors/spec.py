"""What every extractor's config section holds, and what its key is computed from."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest, validate

if TYPE_CHECKING:
    from extractors.extractor import Model
    from extractors.runtime.source import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ExtractorSpec(Strict):
    """The fields that all backends share; each backend's spec adds its own."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"batch_size", "device", "workers", "shard_size"})
    modalities: ClassVar[tuple[str, ...]] = ()
    """What the backend can make vectors of; empty: any modality."""
    shard_items: ClassVar[int | None] = 2048
    """Items per shard where shard_size is not set; None: all at once."""
    keeps: ClassVar[bool] = True
    """Whether an output stays for later runs: not where looking it up again is as cheap."""

    modality: str = Field(description="What the vectors stand for; some backends take any name.")
    backend: str = Field(description="What computes the vectors; extractors/registry.py lists the names.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Type of the stored vectors.")
    batch_size: int | None = Field(None, gt=0, description="Inputs per forward pass; by default what suits the device.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the model runs; auto takes a GPU where there is one."
    )
    workers: int | None = Field(
        None, ge=0, description="Threads or processes that decode images; by default one per thread of the job."
    )
    shard_size: int | None = Field(
        None, gt=0, description="Items after which a job keeps what it has, so that a killed one loses little."
    )

    @field_validator("modality")
    @classmethod
    def _modality_of_backend(cls, value: str) -> str:
        if cls.modalities and value not in cls.modalities:
            can = " or ".join(cls.modalities)
            raise ValueError(f"this backend makes vectors of {can}; set modality: {cls.modalities[0]}")
        if not _NAME.fullmatch(value):
            raise ValueError("a modality is a part of file names: letters, digits, '.', '_' and '-' only")
        return value

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output, without defaults of None and without any path."""
        return self.model_dump(mode="json", exclude=set(self.runtime_fields), exclude_none=True)

    def identity(self) -> dict[str, Any]:
        """Return what the output depends on: the settings and what the model really is. The key is made of it.

        Raises:
            UserError: local weights or a package that the spec names are not there.
        """
        return self.settings() | self.model_identity()

    def model_identity(self) -> dict[str, Any]:
        """Return what the model is where the settings alone don't tell: a digest or a version."""
        return {}

    def items_per_shard(self) -> int | None:
        """Return after how many items a job keeps what it has; None: only when all are done."""
        return self.shard_size or self.shard_items

    def modules(self) -> list[str]:
        """Return the modules whose code determines the output, beside the stage's entry module."""
        return [type(self).__module__]

    def needs(self) -> set[str]:
        """Return the names of the stage's inputs: items, manifest, vectors."""
        return {"items"}

    def uses_gpu(self) -> bool:
        """Return whether the job should hold a GPU where there is one."""
        return self.device != "cpu"

    def read(self, inputs: Mapping[str, Path]) -> "Source[Any]":
        """Return the stage's inputs as this extractor takes them. Loads no model."""
        raise NotImplementedError

    def warn_of_effort(self, items: int) -> None:
        """Tell, before the model loads, if so many items take long on this machine; refuse what takes hours."""

    def load(self) -> "Model[Any]":
        """Load the model and return the extractor."""
        raise NotImplementedError


def parse_extractor(name: str, data: Any, where: str) -> ExtractorSpec:
    """Return the config section of extractor `name` as its backend's spec. Imports no model library.

    Args:
        name: the extractor's name in the config; it becomes part of file names.
        data: the section as YAML gives it.
        where: the key path that stands before each complaint.

    Raises:
        UserError: a bad name, an unknown backend or key, or a value that the backend refuses.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: the name {name!r} becomes a file name: use letters, digits, '.', '_' and '-' only")
    if not isinstance(data, Mapping):
        raise UserError(f"{where} = {data!r}: expected a section with modality and backend")
    # By name, so that a new line in the registry doesn't change the code digest of every extraction.
    registry = importlib.import_module("extractors.registry")
    backend = data.get("backend")
    if backend is None:
        raise UserError(f"{where}.backend: required, but not given{nearest('', registry.BACKENDS)}")
    if backend not in registry.BACKENDS:
        raise UserError(f"{where}.backend = {backend!r}: unknown backend{nearest(backend, registry.BACKENDS)}")
    return validate(registry.spec_class(backend), dict(data), where)
