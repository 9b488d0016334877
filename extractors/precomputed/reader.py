"""Vectors computed elsewhere, looked up by item id: Parquet, .npy with ids, files of Amazon and MicroLens."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from cm3.common.arrays import rows_not_finite
from cm3.common.errors import UserError
from cm3.common.input_files import check_readable, parts_of
from cm3.common.paths import expand
from cm3.common.tables import MISSING, OK
from extractors.extractor import Advance, Encoded, Extractor, no_vectors, silent
from extractors.precomputed.parquet import beyond_float32, read_vectors
from extractors.precomputed.row_ids import RowIds, read_row_ids
from extractors.runtime.source import Source, read_ids
from extractors.spec import BackendSpec, Cost
from extractors.weights.digests import digest_of

log = logging.getLogger("extractors.precomputed")

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
        None,
        description="The file, or for Parquet a folder of parts, identified by its content. Default: the file published with "
        "the dataset.",
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
                f"format: {self.path or 'a file of the dataset'} needs one of parquet, npy, amazon-b, microlens; save other "
                "vectors as Parquet with the columns item_id and embedding, or as .npy"
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
        if self.format or not self.path:
            return self.format
        return _SUFFIXES.get(Path(self.path).suffix) or ("parquet" if _has_parts(self.path) else None)

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of the files. The file published with a dataset is an input of the job instead."""
        found: dict[str, Any] = {"format": self.kind}
        for name, path in (("vectors_sha256", self.path), ("ids_sha256", self.ids)):
            if path is not None:
                file = Path(expand(path))
                found[name] = _digest(file, self.kind == "parquet", "path" if path == self.path else "ids")
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


def _has_parts(path: str) -> bool:
    try:
        return parts_of(folder := Path(expand(path))) != [folder]
    except UserError:  # a variable that is not set
        return False


def _digest(path: Path, may_be_folder: bool, key: str) -> str:
    """Return the sha256 of a file, or of the names and contents of the parts of a Parquet table."""
    parts = parts_of(path) if may_be_folder else [path]
    for part in parts:
        check_readable(part, key)
    if parts == [path]:
        return digest_of(path)
    names = "".join(f"{part.relative_to(path).as_posix()}\0{digest_of(part)}\n" for part in parts)
    return hashlib.sha256(names.encode()).hexdigest()


class PrecomputedExtractor(Extractor[str]):
    """A file of vectors, read as a stream; only the vectors of the requested items are stored."""

    def __init__(self, spec: PrecomputedSpec, path: Path) -> None:
        self.spec, self.path = spec, path
        for part in parts_of(path) if spec.kind == "parquet" else [path]:
            check_readable(part, "path")
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
        seen: list[str] = []
        # Each id once, in order of appearance: its row among the found vectors.
        wanted = ids.dictionary_encode()
        found = no_vectors(len(wanted.dictionary), self.dim, MISSING)
        for names, vectors in self._chunks():
            seen = seen or [name.decode(errors="replace") for name in names[:3].to_pylist()]
            self._copy(found, wanted.dictionary, names, vectors)
        rows = wanted.indices.to_numpy()
        repeats = len(wanted.dictionary) < len(rows)
        result = Encoded(embedding=found.embedding[rows], status=found.status[rows]) if repeats else found
        result.errors = {int(row): f"not in {self.path.name}" for row in np.flatnonzero(result.status == MISSING)}
        if len(ids) and not (result.status == OK).any():
            asked = ", ".join(repr(name.decode()) for name in ids[:3].to_pylist())
            log.warning(
                "%s: none of the %d items is in it. Ids of the items: %s; of the file: %s",
                self.path,
                len(ids),
                asked,
                ", ".join(map(repr, seen)),
            )
        advance(len(ids), ok=len(ids) - len(result.errors), missing=len(result.errors))
        return result

    def _copy(self, found: Encoded, wanted: pa.Array, names: pa.Array, vectors: np.ndarray) -> None:
        """Copy the wanted vectors of a chunk to their rows."""
        place = pc.index_in(names, value_set=wanted)
        wanted_here = place.is_valid().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(wanted_here)
        if not len(rows):
            return
        bad = rows[rows_not_finite(vectors[rows])]
        if len(bad):
            name = names[int(bad[0])].as_py().decode(errors="replace")
            raise UserError(
                f"{self.path}: the vector of id {name!r} holds NaN or infinity; remove the row, or of Parquet give null"
            )
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
            return read_vectors(self.path, self.spec.id_column, self.spec.vector_column)
        if self.spec.kind == "npy":
            return _from_npy(self.path, read_row_ids(Path(expand(str(self.spec.ids)))))
        if self.spec.kind == "microlens":
            return _from_npy(self.path, None)
        return _from_amazon(self.path, self.spec.dim)


def _from_npy(path: Path, ids: RowIds | None) -> Vectors:
    """Read an array in chunks; without ids, row i belongs to item i + 1, as in MicroLens."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu" or not array.shape[1]:
        found = f"of shape {array.shape} and type {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: expected an array of (items, dimensions) of numbers, but it is {found}")
    if ids is None:
        ids = RowIds(path, [str(row + 1).encode() for row in range(len(array))])
    ids.check(path, len(array))
    for start in range(0, len(array), _ROWS):
        part = slice(start, start + _ROWS)
        row = beyond_float32(array[part])
        if row is not None:
            raise UserError(f"{path}, row {start + row}: holds a number beyond float32; scale the vectors")
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
