"""Vectors computed elsewhere, looked up by item id: Parquet, .npy with ids, files of Amazon and MicroLens."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.paths import expand
from cm3.common.strict import nearest
from cm3.common.tables import FAILED, MISSING, OK
from extractors.extractor import Advance, Encoded, Extractor, no_vectors, silent
from extractors.precomputed.row_ids import RowIds, read_row_ids
from extractors.runtime.source import Source, read_ids
from extractors.spec import BackendSpec, Cost
from extractors.weights.digests import digest_of

Vectors = Iterator[tuple[pa.Array, np.ndarray]]
"""Chunks of ids (binary: their UTF-8 bytes) and their (n, d) float32 vectors."""

_SUFFIXES = {".parquet": "parquet", ".npy": "npy", ".b": "amazon-b"}
_ID_BYTES = 10
_ROWS = 1024


class PrecomputedSpec(BackendSpec):
    """Vectors from a file, of any modality."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow")
    cost: ClassVar[Cost] = Cost(1500, 0, 500, bytes_per_item=2 * 4 * 4096)
    runtime_fields: ClassVar[frozenset[str]] = BackendSpec.runtime_fields | {"path", "ids"}
    shard_items: ClassVar[int | None] = None
    cached: ClassVar[bool] = False

    backend: Literal["precomputed"] = Field(description="Look up vectors by item id in a file made elsewhere.")
    path: str | None = Field(
        None, description="The file, identified by its content. Default: the file published with the dataset."
    )
    ids: str | None = Field(
        None,
        description="For .npy: a text file with one item id per row of the array, or MMRec's i_id_mapping.csv. Not for "
        "vectors published with the dataset, which have their own ids.",
    )
    format: Literal["parquet", "npy", "amazon-b", "microlens"] | None = Field(
        None,
        description="Default: by the suffix .parquet, .npy or .b. microlens: an .npy file without ids, whose rows are the "
        "videos 1, 2, 3, ...",
    )
    id_column: str = Field("item_id", description="For Parquet: column of item ids.")
    vector_column: str = Field("embedding", description="For Parquet: column of vectors, lists of equal length.")
    dim: int = Field(4096, gt=0, description="For .b files: length of the vectors.")

    @model_validator(mode="after")
    def _format_is_known(self) -> "PrecomputedSpec":
        if self.kind is None:
            raise ValueError(
                f"format: {self.path or 'a file of the dataset'} needs one of parquet, npy, amazon-b, microlens"
            )
        # Vectors published with a dataset have their own ids; for a file named by `path` they must be given.
        if self.ids is not None and self.kind != "npy":
            raise ValueError("ids: the file of ids belongs to an .npy file")
        if self.ids is None and self.kind == "npy" and self.path is not None:
            raise ValueError(
                "ids: the file of ids belongs to an .npy file, and an .npy file needs it; MicroLens' own need "
                "format: microlens instead"
            )
        return self

    @property
    def kind(self) -> str | None:
        """The format: as configured, else by the suffix."""
        return self.format or (_SUFFIXES.get(Path(self.path).suffix) if self.path else None)

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of the files. The file published with a dataset is an input of the job instead."""
        found: dict[str, Any] = {"format": self.kind}
        for name, path in (("vectors_sha256", self.path), ("ids_sha256", self.ids)):
            if path is not None:
                file = Path(expand(path))
                if not file.is_file():
                    raise UserError(f"path = {path!r}: no such file; put it there or correct the path")
                found[name] = digest_of(file)
        return found

    def needs(self) -> set[str]:
        """Return items, and vectors for the file published with a dataset."""
        return {"items"} if self.path else {"items", "vectors"}

    def uses_gpu(self) -> bool:
        """Return False: there is no model."""
        return False

    def read(self, inputs: Mapping[str, Path]) -> Source[str]:
        """Return the item ids."""
        return read_ids(inputs["items"])

    def load(self) -> "PrecomputedExtractor":
        """Return the extractor of the file.

        Raises:
            UserError: neither `path` nor the stage's input `vectors` names a file.
        """
        if self.path is None:
            raise UserError("path: no file of vectors; set path, or call the stage with --input vectors=FILE")
        return PrecomputedExtractor(self, Path(expand(self.path)))


class PrecomputedExtractor(Extractor[str]):
    """A file of vectors, read as a stream; only the vectors of the requested items are stored."""

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
        """Return the vectors of the ids; ids that are not in the file are missing.

        Raises:
            UserError: an id is duplicated in the file with different vectors, or the file is malformed.
        """
        ids = pa.array(list(inputs), pa.string()).cast(pa.binary())
        # Each id once, in order of appearance: its row among the found vectors.
        wanted = ids.dictionary_encode()
        found = no_vectors(len(wanted.dictionary), self.dim, MISSING)
        for names, vectors in self._chunks():
            self._copy(found, wanted.dictionary, names, vectors)
        rows = wanted.indices.to_numpy()
        repeats = len(wanted.dictionary) < len(rows)
        result = Encoded(embedding=found.embedding[rows], status=found.status[rows]) if repeats else found
        result.errors = {int(row): f"not in {self.path.name}" for row in np.flatnonzero(result.status == MISSING)}
        advance(len(ids), ok=len(ids) - len(result.errors), missing=len(result.errors))
        return result

    def _copy(self, found: Encoded, wanted: pa.Array, names: pa.Array, vectors: np.ndarray) -> None:
        """Copy the wanted vectors of a chunk to their rows."""
        place = pc.index_in(names, value_set=wanted)
        wanted_here = place.is_valid().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(wanted_here)
        if not len(rows):
            return
        places = place.filter(pa.array(wanted_here)).to_numpy()
        first = np.unique(places, return_index=True)[1]
        fresh = first[found.status[places[first]] != OK]
        found.embedding[places[fresh]] = vectors[rows[fresh]]
        found.status[places[fresh]] = OK
        for again in np.setdiff1d(np.arange(len(rows)), fresh):
            if not np.array_equal(found.embedding[places[again]], vectors[rows[again]], equal_nan=True):
                name = names[int(rows[again])].as_py().decode(errors="replace")
                raise UserError(f"{self.path}: id {name!r} is duplicated with different vectors; keep one of them")

    def _chunks(self) -> Vectors:
        if self.spec.kind == "parquet":
            return _from_parquet(self.path, self.spec.id_column, self.spec.vector_column)
        if self.spec.kind == "npy":
            return _from_npy(self.path, read_row_ids(Path(expand(str(self.spec.ids)))))
        if self.spec.kind == "microlens":
            return _from_npy(self.path, None)
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
        state = ["status"] if _has_statuses(file) else []
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
                yield kept.column(id_column).cast(pa.string()).cast(pa.binary()), values.reshape(-1, dim)


def _has_statuses(file: pq.ParquetFile) -> bool:
    """Return whether a column `status` holds ok, missing and failed, as in this pipeline, not other words such as sold."""
    field = file.schema_arrow.field("status") if "status" in file.schema_arrow.names else None
    kind = None if field is None else field.type
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    if kind not in (pa.string(), pa.large_string()):
        return False
    found: set[str | None] = set()
    for batch in file.iter_batches(columns=["status"]):
        found.update(batch.column("status").cast(pa.string()).unique().to_pylist())
    found.discard(None)
    return bool(found) and found <= {OK, MISSING, FAILED}


def _from_npy(path: Path, ids: RowIds | None) -> Vectors:
    """Read an array in chunks; without ids, row i belongs to item i + 1, as in MicroLens."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected an array of (items, dimensions) of numbers")
    if ids is None:
        ids = RowIds(path, [str(row + 1).encode() for row in range(len(array))])
    ids.check(path, len(array))
    for start in range(0, len(array), _ROWS):
        part = slice(start, start + _ROWS)
        yield pa.array(ids.names[part], pa.binary()), np.asarray(array[part], dtype=np.float32)


def _from_amazon(path: Path, dim: int) -> Vectors:
    """Read the image features published with the 2014 Amazon data: 10 bytes of ASIN, then `dim` float32, repeated."""
    record = np.dtype([("id", f"S{_ID_BYTES}"), ("vector", "<f4", (dim,))])
    size = path.stat().st_size
    if size % record.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not a multiple of the record size {record.itemsize} ({_ID_BYTES} of id, {dim} float32); "
            "the download is incomplete, or dim is wrong"
        )
    with path.open("rb") as file:
        while data := file.read(_ROWS * record.itemsize):
            records = np.frombuffer(data, record)
            yield pa.array(records["id"].tolist(), pa.binary()), records["vector"]
