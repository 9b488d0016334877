"""Images in the shards of earlier runs; each is compared with its sha256 before it counts."""

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cm3.common.checksums import check_parquet
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.images import memory_for, shard_path
from cm3.common.tables import IMAGES, reading_parquet

log = logging.getLogger("cm3.datasets.images")


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of an image's bytes: a row of a row group of a shard."""

    shard: int
    group: int
    row: int
    length: int


class StoredImages:
    """The whole images in the shards of a folder.

    Attributes:
        shards: sha256 of the images of each shard without damage, in row order, by the number of the shard.
    """

    def __init__(self, folder: Path) -> None:
        self.shards: dict[int, list[str]] = {}
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._group: tuple[tuple[int, int], Any] | None = None
        for path in sorted(folder.glob("shard-*.parquet")):
            number = path.stem.removeprefix("shard-")
            if number.isdigit() and path == self._path(int(number)):
                self._add_shard(int(number), path)

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._places

    def length(self, sha256: str) -> int:
        """Return the number of bytes of an image."""
        return self._places[sha256].length

    def read(self, sha256: str) -> bytes:
        """Return an image's bytes, checked.

        Raises:
            UserError: they have changed since the shard was checked.
        """
        place = self._places[sha256]
        path, at = self._path(place.shard), (place.shard, place.group)
        if self._group is None or self._group[0] != at:
            with memory_for(path), reading_parquet(path), pq.ParquetFile(path) as file:
                self._group = (at, file.read_row_group(place.group, columns=["bytes"]).column("bytes"))
        data: bytes = self._group[1][place.row].as_py()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path}: an image in it changed while the stage ran; run the same command again")
        return data

    def _path(self, number: int) -> Path:
        return shard_path(self._folder / "manifest.parquet", number)

    def _add_shard(self, number: int, path: Path) -> None:
        whole: list[str] = []
        damaged = 0
        try:
            with memory_for(path), reading_parquet(path):
                check_parquet(path)
                # Without the checksums of pages: each image has its own, and one damaged page leaves the others whole.
                with pq.ParquetFile(path) as file:
                    if not file.schema_arrow.remove_metadata().equals(IMAGES):
                        raise DamagedFileError(path, "its columns are not those of an image shard")
                    for group in range(file.num_row_groups):
                        rows: int = file.metadata.row_group(group).num_rows
                        found = self._add_group(number, path, file, group)
                        whole += found
                        damaged += rows - len(found)
        except DamagedFileError as error:
            log.warning("%s: damaged (%s); its images are taken from their source again", path, error.reason)
            return
        if damaged:
            log.warning(
                "%s: damaged (%d images are not those that were stored); they are taken from their source again",
                *(path, damaged),
            )
        else:
            self.shards[number] = whole

    def _add_group(self, number: int, path: Path, file: pq.ParquetFile, group: int) -> list[str]:
        """Note the places of the images in a row group; return the sha256 of those that are whole."""
        whole: list[str] = []
        with contextlib.suppress(DamagedFileError), memory_for(path), reading_parquet(path):
            table = file.read_row_group(group, columns=IMAGES.names)
            for row, (digest, data) in enumerate(zip(table.column("sha256"), table.column("bytes"), strict=True)):
                content = data.as_buffer()
                sha256 = digest.as_py()
                if content is not None and hashlib.sha256(content).hexdigest() == sha256:
                    self._places.setdefault(sha256, _Place(number, group, row, content.size))
                    whole.append(sha256)
        return whole
