"""Image shards: Parquet files of original bytes, each distinct image once, in the order of items.

A run appends: new images go to new shards, and the shards of earlier runs stay as they are while all their images are used.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from cm3.common.files import atomic
from cm3.common.images import IMAGES_PER_ROW_GROUP, shard_path
from cm3.common.tables import IMAGES, parquet_writer
from cm3.datasets.images.stored import StoredImages

SHARD_BYTES = 256_000_000
SMALL_SHARDS = 16
"""Largest number of shards below half of the size; a run that has new images writes more of them anew as full ones."""
KNOWN = ".known.parquet"
"""Table next to the manifest that an image source keeps for the next run; it describes the shards."""
# Readers and the writer have one row group in memory.
_ROW_GROUP_BYTES = 16_000_000


def fresh_folder(folder: Path) -> Path:
    """Return the empty folder inside `folder` that the next manifest and new shards are written to.

    Files of a run that was killed while moving them to their place (see `put_in_place`) are moved first.
    """
    fresh = folder / ".fresh"
    if (fresh / "manifest.parquet").exists():
        _move(fresh, folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def put_in_place(fresh: Path, manifest: Path, kept: Collection[int]) -> None:
    """Add the shards in `fresh` to those that are kept, delete others, and replace known outcomes and manifest.

    A kill at any moment loses nothing: while `fresh` holds a manifest, which must be written last, all its files are
    complete, and every image is there, in its place, or in a shard that is kept. The manifest is moved last, so shards of
    another manifest are never read.
    """
    folder = manifest.parent
    needed = {path.name for path in fresh.glob("shard-*.parquet")}
    needed |= {shard_path(manifest, number).name for number in kept}
    if not (fresh / KNOWN).exists():
        (folder / KNOWN).unlink(missing_ok=True)
    _move(fresh, folder)
    for path in folder.glob("shard-*.parquet"):
        if path.name not in needed:
            path.unlink()
    (fresh / "manifest.parquet").replace(manifest)
    shutil.rmtree(fresh)


def _move(fresh: Path, folder: Path) -> None:
    # Outcomes first: the old ones do not know the new images, the new ones need no image of a shard that goes.
    if (fresh / KNOWN).exists():
        (fresh / KNOWN).replace(folder / KNOWN)
    for path in sorted(fresh.glob("shard-*.parquet")):
        path.replace(folder / path.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_images(
    writer: "ShardWriter", stored: StoredImages, used: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Complete the new shards with the used images of earlier shards that are not kept, and number them.

    A shard is kept if all its images are used and in the order of items, so that the images of a data set are read in this
    order whatever its history. All other images are in new shards in this order, under the lowest free numbers: a shard
    with a damaged image becomes what it was, and a killed run that is repeated gives the same files.

    Args:
        writer: has written the images that are in no earlier shard, in the order of items; it is ended.
        stored: the images in the earlier shards.
        used: sha256 of all images in the order of items.

    Returns:
        (shard, row) of each image, and the numbers of the earlier shards that are kept.
    """
    writer.end_shard()
    kept = _kept(stored, used, writer.shard_bytes, appends=writer.count > 0)
    places = {sha256: (number, row) for number in kept for row, sha256 in enumerate(stored.shards[number])}
    manifest, rest = writer.manifest, [sha256 for sha256 in used if sha256 not in places]
    if any(sha256 in stored for sha256 in rest):
        new = StoredImages(manifest.parent)
        with ShardWriter(manifest.parent / "merged" / manifest.name, writer.shard_bytes) as merged:
            for sha256 in rest:
                merged.add(sha256, (stored if sha256 in stored else new).read(sha256))
        for number in range(writer.count):
            shard_path(manifest, number).unlink()
        writer = merged
    free = list(itertools.islice((n for n in itertools.count() if n not in kept), writer.count))
    for old, number in reversed(list(enumerate(free))):  # a number is free before it is taken
        shard_path(writer.manifest, old).rename(shard_path(manifest, number))
    return places | {sha256: (free[shard], row) for sha256, (shard, row) in writer.places.items()}, kept


def _kept(stored: StoredImages, used: Sequence[str], shard_bytes: int, appends: bool) -> list[int]:
    rank = {sha256: number for number, sha256 in enumerate(used)}
    kept: list[int] = []
    taken: set[str] = set()
    for number, images in sorted(stored.shards.items()):
        ranks = [-1, *(rank.get(sha256, -1) for sha256 in images)]
        in_order = all(before < after for before, after in itertools.pairwise(ranks))
        if images and in_order and taken.isdisjoint(images):
            kept.append(number)
            taken.update(images)
    sizes = {number: sum(map(stored.length, stored.shards[number])) for number in kept}
    small = {number for number in kept if sizes[number] < shard_bytes / 2}
    return [number for number in kept if number not in small] if appends and len(small) > SMALL_SHARDS else kept


class ShardWriter:
    """Writes shard-00000.parquet, shard-00001.parquet, ... next to a manifest; the boundaries depend on bytes only.

    Use as a context manager. If the body fails, finished shards stay and the current one is deleted.

    Attributes:
        count: number of shards begun.
        places: (shard, row) of each image, by its sha256.
    """

    def __init__(self, manifest: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.manifest, self.shard_bytes = manifest, shard_bytes
        self.count = 0
        self.places: dict[str, tuple[int, int]] = {}
        self._group: list[tuple[str, bytes]] = []
        self._rows = self._bytes = self._group_bytes = 0
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, sha256: str, data: bytes) -> tuple[int, int]:
        """Store an image unless the same bytes are stored already; return its (shard, row)."""
        if sha256 in self.places:
            return self.places[sha256]
        if self._open is not None and self._bytes + len(data) > self.shard_bytes:
            self.end_shard()
        if self._open is None:
            self._start()
        place = self.places[sha256] = (self.count - 1, self._rows)
        self._group.append((sha256, data))
        self._rows += 1
        self._bytes += len(data)
        self._group_bytes += len(data)
        if len(self._group) == IMAGES_PER_ROW_GROUP or self._group_bytes >= _ROW_GROUP_BYTES:
            self._flush()
        return place

    def _start(self) -> None:
        self._open = contextlib.ExitStack()
        temporary = self._open.enter_context(atomic(shard_path(self.manifest, self.count)))
        # Images are compressed already, and column statistics over their bytes would store some of them twice.
        self._writer = self._open.enter_context(
            parquet_writer(temporary, IMAGES, compression="none", use_dictionary=False, write_statistics=["sha256"])
        )
        self.count += 1
        self._rows = self._bytes = 0

    def _flush(self) -> None:
        if self._group:
            digests, values = zip(*self._group, strict=True)
            self._writer.write_table(pa.table([digests, values], schema=IMAGES))
            self._group.clear()
            self._group_bytes = 0

    def end_shard(self) -> None:
        """Finish the current shard; the next image begins another one."""
        if self._open is not None:
            self._flush()
            self._open.close()
            self._open = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end_shard()
        elif self._open is not None:
            self._open.__exit__(kind, error, trace)
