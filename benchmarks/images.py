"""Speed of the images stage against a loopback server that misbehaves for a fifth of the images.

    python benchmarks/images.py --images 2000 6000 20000

The stage runs as Snakemake runs it, `python -m cm3.datasets.images.stage`, with its default settings but for the rate, which is
not bounded. The server is another process on the same machine. Images are JPEGs of 300-500 pixels, 15-40 kB; of a
hundred, 10 are not found, 4 break once, 2 are cut once, 2 are truncated, 1 is a dot, 1 is refused once with 429.
Of a run, images/s is items by the stage's whole time, from start to record, imports left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from image_server import Address, running, status_of  # noqa: E402

from cm3.common.tables import ITEMS, write_table  # noqa: E402
from cm3.datasets.images.config import Images  # noqa: E402


def measure(server: Address, first: int, count: int, folder: Path) -> dict[str, Any]:
    """Run the stage on images `first` to `first + count` and return its record."""
    empty = {field.name: pa.nulls(count, field.type) for field in ITEMS}
    numbers = range(first, first + count)
    columns = {
        **empty,
        "item": pa.array(range(count), pa.int32()),
        "item_id": pa.array([f"item{number}" for number in numbers]),
        "image_urls": pa.array([[server.url(number)] for number in numbers]),
    }
    write_table(folder / "items.parquet", pa.table(columns), ITEMS)
    config = Images(hosts=["127.0.0.1"], private=True, rate=1e6)
    out = folder / "images"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "cm3.datasets.images.stage",
            "--spec",
            json.dumps(config.spec()),
            "--runtime",
            json.dumps({**config.runtime(), "threads": os.cpu_count()}),
            "--input",
            f"items={folder / 'items.parquet'}",
            "--output",
            f"manifest={out / 'manifest.parquet'}",
            "--output",
            f"record={out / 'images.stage.json'}",
        ],
        cwd=ROOT,
        check=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "no_proxy": "*"},
    )
    record: dict[str, Any] = json.loads((out / "images.stage.json").read_text())
    for status in ("ok", "missing", "failed"):
        assert record[f"images_{status}"] == sum(status_of(number) == status for number in numbers), record
    return record


def main() -> None:
    """Measure each size and print a row of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 6000, 20000])
    counts = parser.parse_args().images
    print("images   seconds  of them fetching  images/s  peak MB      ok  missing  failed  shards MB")
    with running() as server:
        for number, count in enumerate(counts):
            with tempfile.TemporaryDirectory() as folder:
                # Other numbers each time, for a server that fails once fails once only.
                found = measure(server, number * 1_000_000, count, Path(folder))
            print(
                f"{count:8d}  {found['wall_seconds']:8.1f}  {found['fetch_seconds']:16.1f}"
                f"  {count / found['wall_seconds']:10.0f}  {found['peak_memory_mb']:7.0f}  {found['images_ok']:6d}"
                f"  {found['images_missing']:7d}  {found['images_failed']:6d}  {found['image_bytes'] / 1e6:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
