"""New images are appended: earlier shards stay, and images are read in the same order whatever the history."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles_sources import image, items_file
from repository import ROOT

from cm3.common.images import iter_images
from cm3.common.ledger import Ledger
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images import shards
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images
from extractors.image.item_images import read_images
from workflow.records import check_outputs
from workflow.snakemake_internals import METADATA

SHARD = 12_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images; p10 and p50 are the same one."""
    images = tmp_path_factory.mktemp("folder")
    for n in range(60):
        (images / f"p{n:02d}.bmp").write_bytes(image((20, 15), colour=(n, 2 * n, 3 * n), format="BMP"))
    shutil.copy(images / "p10.bmp", images / "p50.bmp")
    return images


def collect(place: Path, folder: Path, numbers: Any, shard_bytes: int = SHARD) -> dict[str, Any]:
    items = items_file(place / "items.parquet", {f"p{n:02d}": [] for n in numbers})
    spec = Images(folder=str(folder), pattern="{item_id}.bmp").spec()
    return collect_images(spec, {}, items, {}, place / "out" / "manifest.parquet", shard_bytes)


def stamps(place: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (place / "out").glob("shard-*")}


def read(place: Path) -> list[tuple[int, bytes]]:
    """The inputs of an image extractor, in their order."""
    source = read_images(place / "items.parquet", place / "out" / "manifest.parquet")
    found = list(zip(source.rows.tolist(), source.stream(source.rows), strict=True))
    assert found == list(iter_images(place / "out" / "manifest.parquet"))
    return found


def test_new_images_leave_the_earlier_shards_alone(tmp_path: Path, folder: Path):
    most = [n for n in range(60) if n % 7]
    first = collect(tmp_path, folder, most)
    before = stamps(tmp_path)
    assert first["shards"] == len(before) > 3 and first["shards_kept"] == 0
    second = collect(tmp_path, folder, range(60))
    after = stamps(tmp_path)
    assert before.items() < after.items() and second["shards_kept"] == len(before)
    assert second["distinct_images"] == 59 and second["shards"] == len(after)
    collect(tmp_path / "fresh", folder, range(60))
    assert read(tmp_path) == read(tmp_path / "fresh")
    # In parts, as extractors read them, each image comes once and with the item that it belongs to.
    source = read_images(tmp_path / "items.parquet", tmp_path / "out" / "manifest.parquet")
    parts = np.array_split(source.rows, 7)
    assert [data for part in parts for data in source.stream(part)] == [data for _, data in read(tmp_path)]
    assert collect(tmp_path, folder, range(60))["shards_kept"] == len(after) and stamps(tmp_path) == after


def test_shards_with_unused_images_are_written_anew_without_them(tmp_path: Path, folder: Path):
    collect(tmp_path, folder, range(40))
    before = stamps(tmp_path)
    some = [n for n in range(60) if n != 20]
    facts = collect(tmp_path, folder, some)
    assert facts["shards_kept"] == len(before) - 1 and len(before.items() & stamps(tmp_path).items()) == len(before) - 1
    collect(tmp_path / "fresh", folder, some)
    assert read(tmp_path) == read(tmp_path / "fresh")
    digests = read_table(tmp_path / "out/manifest.parquet", MANIFEST, ["sha256"])["sha256"].to_pylist()
    assert facts["distinct_images"] == len(set(digests)) == 58


def test_a_damaged_shard_becomes_what_it_was(tmp_path: Path, folder: Path):
    collect(tmp_path, folder, range(60))
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    shard, untouched = tmp_path / "out/shard-00001.parquet", stamps(tmp_path)
    data = bytearray(shard.read_bytes())
    data[500] ^= 1
    shard.write_bytes(data)
    collect(tmp_path, folder, range(60))
    assert {path: path.read_bytes() for path in files} == files
    assert len(untouched.items() & stamps(tmp_path).items()) == len(untouched) - 1


def test_items_in_another_order_are_read_in_it(tmp_path: Path, folder: Path):
    collect(tmp_path, folder, range(60))
    turned = list(range(59, -1, -1))
    assert collect(tmp_path, folder, turned)["shards_kept"] == 0
    collect(tmp_path / "fresh", folder, turned)
    assert read(tmp_path) == read(tmp_path / "fresh")


def test_many_small_shards_become_full_ones(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "SMALL_SHARDS", 3)
    counts = []
    for n in range(1, 11):
        counts.append(collect(tmp_path, folder, range(n), shard_bytes=100_000)["shards"])
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    collect(tmp_path / "fresh", folder, range(10), shard_bytes=100_000)
    assert read(tmp_path) == read(tmp_path / "fresh")


STAGE = f"""
from cm3.datasets.images.stage import collect_images, main
collect_images.__defaults__ = ({SHARD}, None)
main()
"""


def test_a_later_run_knows_of_shards_that_went(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    METADATA.mkdir(parents=True)
    out = Path("processed/shop/images")
    words = ["--spec", json.dumps(Images(folder=str(folder), pattern="{item_id}.bmp").spec()), "--identity", "images 1"]
    words += ["--input", "items=items.parquet", "--output", f"manifest={out}/manifest.parquet"]
    entries = []
    for numbers in (range(60), range(20)):
        items_file(Path("items.parquet"), {f"p{n:02d}": [] for n in numbers})
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", STAGE, *words], env=environment, check=True, capture_output=True)
        entries.append({entry.path for entry in Ledger().entries()})
        assert check_outputs(Ledger()) == []
    assert entries[1] < entries[0] and {str(path) for path in out.glob("shard-*")} < entries[1]
