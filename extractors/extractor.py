"""Interface of loaded models: from a sequence of inputs to one output and one status per input."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.features import features_schema
from cm3.common.tables import FAILED, MISSING, OK

T = TypeVar("T")
Advance = Callable[..., None]
"""Progress callback: `advance(n, ok=.., failed=..)` after n more inputs."""


def silent(n: int = 1, **counts: int) -> None:
    """Ignore progress."""


@dataclass(kw_only=True)
class Result(ABC):
    """Outputs of n inputs.

    Attributes:
        status: (n,) str: ok, missing or failed.
        errors: reasons by row, for rows that are not ok.
        counts: further counts for the record, such as truncated_texts.
    """

    status: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @abstractmethod
    def columns(self, dtype: str) -> dict[str, pa.Array]:
        """Return the output as columns of n rows for a shard's table; vectors have the type `dtype`."""

    @abstractmethod
    def check(self, names: Sequence[str]) -> None:
        """Raise a UserError that names the items if the model returned an invalid output."""


@dataclass(kw_only=True)
class Encoded(Result):
    """The vectors of n inputs.

    Attributes:
        embedding: (n, d) float32; rows that are not ok are zero.
    """

    embedding: np.ndarray

    def columns(self, dtype: str) -> dict[str, pa.Array]:
        """Return the vectors as lists of fixed size."""
        with np.errstate(
            over="ignore"
        ):  # an overflow of float16 becomes infinite, and is refused when the output is written
            values = pa.array(np.ascontiguousarray(self.embedding, dtype).reshape(-1))
        kind = features_schema(self.embedding.shape[1], dtype).field("embedding").type
        return {"embedding": pa.FixedSizeListArray.from_arrays(values, type=kind)}

    def check(self, names: Sequence[str]) -> None:
        """Check for NaN and infinity.

        Raises:
            UserError: a vector holds NaN or infinity; names the first items.
        """
        bad = np.flatnonzero((self.status == OK) & ~np.isfinite(self.embedding).all(axis=1))
        if len(bad):
            raise UserError(
                f"{len(bad)} vectors hold NaN or infinity, first of items {', '.join(names[row] for row in bad[:5])}; "
                "finished shards are kept. Check the inputs of these items, or try precision: float32"
            )


class Model(ABC, Generic[T]):
    """A loaded model with inputs of type T: texts, images, ids."""

    device: str = "cpu"

    @abstractmethod
    def run(self, inputs: Iterable[T], advance: Advance = silent) -> Result:
        """Return the outputs in the order of the inputs. Inputs that cannot be decoded are failed, with the reason."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return properties of the loaded model for the output file's metadata: preprocessing, pooling, prompt."""


class Extractor(Model[T]):
    """A loaded model that turns inputs into vectors of `dim` numbers."""

    dim: int

    @abstractmethod
    def run(self, inputs: Iterable[T], advance: Advance = silent) -> Encoded:
        """Return the vectors in the order of the inputs. Inputs that cannot be decoded are failed, with the reason."""

    @abstractmethod
    def input_of(self, item: Mapping[str, Any]) -> T | None:
        """Return the input that an item gives, None if the item lacks it."""

    def encode(self, items: Sequence[Mapping[str, Any]]) -> Encoded:
        """Return the vectors of N items as (N, d) float32 with a status per row.

        Args:
            items: mappings with the keys of items.parquet, and `image` (bytes or a path) for images.

        Raises:
            UserError: the model returned NaN or infinity; names the items.
        """
        inputs = [self.input_of(item) for item in items]
        rows = np.array([row for row, value in enumerate(inputs) if value is not None], dtype=np.int64)
        encoded = self.run(value for value in inputs if value is not None) if len(rows) else None
        result = no_vectors(len(items), self.dim, MISSING)  # `run` may set dim
        if encoded is not None:
            encoded.check([str(items[row].get("item_id", f"number {row}")) for row in rows])
            result.embedding[rows] = encoded.embedding
            result.status[rows] = encoded.status
            result.errors = {int(rows[row]): reason for row, reason in encoded.errors.items()}
            result.counts = encoded.counts
        return result


def no_vectors(count: int, dim: int, status: str) -> Encoded:
    """Return `count` rows of zeros with one status."""
    return Encoded(embedding=np.zeros((count, dim), np.float32), status=np.full(count, status, dtype=object))


def collect(vectors: Mapping[int, np.ndarray], errors: Mapping[int, str], count: int, dim: int) -> Encoded:
    """Return `count` rows from vectors and errors by row.

    Raises:
        UserError: the length of a vector is not `dim`.
    """
    encoded = no_vectors(count, dim, FAILED)
    encoded.errors = dict(errors)
    for row, vector in vectors.items():
        if vector.shape != (dim,):
            raise UserError(f"the model made vectors of {dim} dimensions, then one of {vector.shape[-1]}")
        encoded.embedding[row] = vector
        encoded.status[row] = OK
    return encoded
