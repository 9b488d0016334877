"""Stored images: what is read is what the manifest names, or the error names the shard."""

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from oracles_sources import image, items_file

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.images import iter_images, row_groups, shard_path
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images

COUNT = 12


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest with two shards of equally many images of one size."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(COUNT):
        (folder / f"p{n:02d}.bmp").write_bytes(image((20, 20), colour=(n, 2 * n, 3 * n), format="BMP"))
    spec = Images(folder=str(folder), pattern="{item_id}.bmp").spec()
    items = items_file(tmp_path / "items.parquet", {f"p{n:02d}": [] for n in range(COUNT)})
    size = (folder / "p00.bmp").stat().st_size
    collect_images(spec, {}, items, {}, tmp_path / "out" / "manifest.parquet", shard_bytes=size * COUNT // 2)
    return tmp_path / "out" / "manifest.parquet"


def test_all_images_are_read_and_some_on_request(manifest: Path) -> None:
    everything = dict(iter_images(manifest))
    assert len(everything) == COUNT and len(set(everything.values())) == COUNT
    assert dict(iter_images(manifest, [7, 3])) == {n: everything[n] for n in (3, 7)}


def test_swapped_shards_are_noticed(manifest: Path) -> None:
    first, second = shard_path(manifest, 0), shard_path(manifest, 1)
    first.rename(manifest.parent / "aside")
    second.rename(first)
    (manifest.parent / "aside").rename(second)
    with pytest.raises(DamagedFileError, match=r"shard-00000\.parquet: damaged \(the image in row 0 is not the one"):
        list(iter_images(manifest))


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "another table", "folder"])
def test_a_shard_that_is_no_shard_is_named(manifest: Path, damage: str) -> None:
    shard = shard_path(manifest, 1)
    data = shard.read_bytes()
    shard.unlink()
    if damage == "empty":
        shard.write_bytes(b"")
    elif damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "another table":
        shard.write_bytes(manifest.read_bytes())
    elif damage == "folder":
        shard.mkdir()
    with pytest.raises(DamagedFileError) as raised:
        list(iter_images(manifest))
    assert raised.value.path == shard


def test_a_shard_with_fewer_rows_is_named(manifest: Path) -> None:
    shard = shard_path(manifest, 1)
    pq.write_table(pq.read_table(shard).slice(0, 3), shard)
    with pytest.raises(DamagedFileError, match="it has no row 3, which the manifest names"):
        list(iter_images(manifest))


@pytest.mark.parametrize("checksums", [True, False])
def test_no_flipped_bit_gives_another_image(manifest: Path, checksums: bool) -> None:
    shard = shard_path(manifest, 0)
    if not checksums:  # as earlier releases wrote it
        pq.write_table(pq.read_table(shard), shard, compression="none", use_dictionary=False)
    whole, data, chance = dict(iter_images(manifest)), shard.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        shard.write_bytes(flipped)
        try:
            assert dict(iter_images(manifest)) == whole
        except DamagedFileError as error:
            assert error.path == shard
            noticed += 1
    assert noticed > 100  # others are in statistics that nobody reads


def test_shards_have_the_checksums_of_their_pages(manifest: Path) -> None:
    with shard_path(manifest, 0).open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match=r"shard-00000\.parquet: damaged"):
        list(row_groups(shard_path(manifest, 0)))


def test_row_groups_without_a_wanted_row_are_not_read(manifest: Path) -> None:
    assert [start for start, _ in row_groups(shard_path(manifest, 0), np.array([2]))] == [0]
    assert not list(row_groups(shard_path(manifest, 0), np.array([], np.int64)))
