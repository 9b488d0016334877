"""Vectors that were computed elsewhere, looked up by item id: Parquet, .npy with ids, or Amazon's .b files."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from extractors.digests import digest_of
from extractors.extractor import Advance, Encoded, Extractor, no_vectors, silent
from extractors.source import Source, read_ids
from extractors.spec import ExtractorSpec
from stages.errors import UserError
from stages.paths import expand
from stages.strict import nearest
from stages.tables import MISSING, OK

Vectors = Iterator[tuple[list[str], np.ndarray]]
"""Chunks of ids and their (n, d) float32 vectors."""

_SUFFIXES = {".parquet": "parquet", ".npy": "npy", ".b": "amazon-b"}
_ID_BYTES = 10
_ROWS = 1024


class PrecomputedSpec(ExtractorSpec):
    """Vectors from a file, of any modality."""

    runtime_fields: ClassVar[frozenset[str]] = ExtractorSpec.runtime_fields | {"path", "ids"}
    shard_items: ClassVar[int | None] = None

    backend: Literal["precomputed"] = Field(description="Look vectors up by item id in a file made elsewhere.")
    path: str | None = Field(
        None, description="The file; identified by content, it may move. Without it the data set's own file is taken."
    )
    ids: str | None = Field(None, description="For .npy: a text file with one item id per row of the array.")
    format: Literal["parquet", "npy", "amazon-b"] | None = Field(
        None, description="By default as the file's suffix says: .parquet, .npy, .b."
    )
    id_column: str = Field("item_id", description="For Parquet: the column of ids.")
    vector_column: str = Field("embedding", description="For Parquet: the column of vectors, lists of equal length.")
    dim: int = Field(4096, gt=0, description="For .b files: numbers per vector.")

    @model_validator(mode="after")
    def _format_is_known(self) -> "PrecomputedSpec":
        if self.kind is None:
            raise ValueError(f"format: {self.path or 'a file of the data set'} needs one of parquet, npy, amazon-b")
        if (self.kind == "npy") != (self.ids is not None):
            raise ValueError("ids: the file of ids belongs to an .npy file, and an .npy file needs it")
        return self

    @property
    def kind(self) -> str | None:
        """The format, given or told by the suffix."""
        return self.format or (_SUFFIXES.get(Path(self.path).suffix) if self.path else None)

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of the files. The data set's own file is an input of the job instead."""
        found: dict[str, Any] = {"format": self.kind}
        for name, path in (("vectors_sha256", self.path), ("ids_sha256", self.ids)):
            if path is not None:
                file = Path(expand(path))
                if not file.is_file():
                    raise UserError(f"path = {path!r}: no such file; put it there or correct the path")
                found[name] = digest_of(file)
        return found

    def needs(self) -> set[str]:
        """Return items, and vectors where the file is one of the data set's."""
        return {"items"} if self.path else {"items", "vectors"}

    def uses_gpu(self) -> bool:
        """Return False: it only reads."""
        return False

    def read(self, inputs: Mapping[str, Path]) -> Source[str]:
        """Return the item ids."""
        return read_ids(inputs["items"])

    def load(self) -> "PrecomputedExtractor":
        """Return the extractor of the file.

        Raises:
            UserError: no file is named, by `path` or as the stage's input `vectors`.
        """
        if self.path is None:
            raise UserError("path: no file of vectors is named; set path, or hand the stage --input vectors=FILE")
        return PrecomputedExtractor(self, Path(expand(self.path)))


class PrecomputedExtractor(Extractor[str]):
    """A file of vectors, read in a stream; only those of the items asked for are kept."""

    def __init__(self, spec: PrecomputedSpec, path: Path) -> None:
        self.spec, self.path = spec, path
        if not path.is_file():
            raise UserError(f"path = {str(path)!r}: no such file; put it there or correct the path")
        first = next(self._chunks(), None)
        if first is None:
            raise UserError(f"{path}: holds no vectors")
        self.dim = first[1].shape[1]

    def input_of(self, item: Mapping[str, Any]) -> str | None:
        """Return the item's id."""
        return item.get("item_id")

    def facts(self) -> dict[str, Any]:
        """Return the format of the file."""
        return {"format": self.spec.kind}

    def run(self, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        """Return the vectors of the ids; those that the file lacks are missing.

        Raises:
            UserError: an id stands twice in the file with different vectors, or the file is malformed.
        """
        ids = list(inputs)
        place: dict[str, list[int]] = {}
        for row, item_id in enumerate(ids):
            place.setdefault(item_id, []).append(row)
        result = no_vectors(len(ids), self.dim, MISSING)
        for found, vectors in self._chunks():
            for item_id, vector in zip(found, vectors, strict=True):
                for row in place.get(item_id, ()):
                    if result.status[row] == OK and not np.array_equal(result.embedding[row], vector, equal_nan=True):
                        raise UserError(
                            f"{self.path}: id {item_id!r} stands twice with different vectors; keep one of them"
                        )
                    result.embedding[row], result.status[row] = vector, OK
        result.errors = {int(row): f"not in {self.path.name}" for row in np.flatnonzero(result.status == MISSING)}
        advance(len(ids), ok=int((result.status == OK).sum()), missing=len(result.errors))
        return result

    def _chunks(self) -> Vectors:
        if self.spec.kind == "parquet":
            return _from_parquet(self.path, self.spec.id_column, self.spec.vector_column)
        if self.spec.kind == "npy":
            return _from_npy(self.path, Path(expand(str(self.spec.ids))))
        return _from_amazon(self.path, self.spec.dim)


def _from_parquet(path: Path, id_column: str, vector_column: str) -> Vectors:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        for column in (id_column, vector_column):
            if column not in names:
                raise UserError(
                    f"{path}: has no column {column!r}{nearest(column, names)}; set id_column, vector_column"
                )
        # A features file of this pipeline holds zeros for items that had no input.
        state = ["status"] if "status" in names else []
        dim: int | None = None
        for batch in file.iter_batches(_ROWS, columns=[id_column, vector_column, *state]):
            there = batch.column(vector_column).is_valid()
            if state:
                there = pc.and_(there, pc.equal(batch.column("status").cast(pa.string()), OK))
            kept = batch.filter(there)
            vectors = kept.column(vector_column)
            if not (
                pa.types.is_list(vectors.type)
                or pa.types.is_large_list(vectors.type)
                or pa.types.is_fixed_size_list(vectors.type)
            ):
                raise UserError(f"{path}: column {vector_column!r} is {vectors.type}, not a list of numbers")
            lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
            if len(lengths):
                dim = int(lengths[0]) if dim is None else dim
                wrong = np.flatnonzero(lengths != dim)
                if len(wrong):
                    name = kept.column(id_column)[int(wrong[0])].as_py()
                    raise UserError(
                        f"{path}: the vector of {name!r} has {lengths[wrong[0]]} numbers, those before it {dim}"
                    )
                values = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                yield kept.column(id_column).cast(pa.string()).to_pylist(), values.reshape(-1, dim)


def _from_npy(path: Path, ids: Path) -> Vectors:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected an array of (items, dimensions) of numbers")
    try:
        names = ids.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"ids = {str(ids)!r}: not a readable text file ({error})") from error
    if len(names) != len(array):
        raise UserError(f"{ids}: {len(names)} ids, but {path} has {len(array)} rows; they must be of the same items")
    for start in range(0, len(array), _ROWS):
        yield names[start : start + _ROWS], np.asarray(array[start : start + _ROWS], dtype=np.float32)


def _from_amazon(path: Path, dim: int) -> Vectors:
    """Read the image features published with the 2014 Amazon data: 10 bytes of ASIN, then `dim` float32, repeated."""
    record = np.dtype([("id", f"S{_ID_BYTES}"), ("vector", "<f4", (dim,))])
    size = path.stat().st_size
    if size % record.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not whole records of {record.itemsize} ({_ID_BYTES} of id, {dim} float32); "
            "the download is cut short, or dim is wrong"
        )
    with path.open("rb") as file:
        while data := file.read(_ROWS * record.itemsize):
            records = np.frombuffer(data, record)
            yield [name.decode("ascii", "replace") for name in records["id"].tolist()], records["vector"]
