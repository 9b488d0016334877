"""Reading and cutting Amazon data: lines a second, peak memory, and growth with size.

    python benchmarks/data.py reviews --sizes 300000 1000000 3000000
    python benchmarks/data.py metadata --sizes 50000 150000 500000
    python benchmarks/data.py kcore --sizes 5000000 15000000 50000000
    python benchmarks/data.py prepare --sizes 300000 1000000 3000000

Files are generated in the published format of 2014 in a temporary folder. Each size runs in a process of its own, whose
peak memory is its own.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cm3.common.usage import peak_memory_mb

WANTED = 63_001


def write_reviews(path: Path, lines: int) -> None:
    """Reviews of 700 bytes; every eighth line brings a new user, every thirtieth a new item."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=65)) for _ in range(5000)]
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(lines):
            user = int(lines / 8 * rng.random() ** 2)
            file.write(
                f'{{"reviewerID": "A{user * 2654435761 % 2**42:013X}", "asin": "B{int(lines / 30 * rng.random() ** 2):09d}", '
                f'"reviewerName": "x", "helpful": [0, 0], "reviewText": "{rng.choice(texts)}", "overall": {rng.randint(1, 5)}.0, '
                f'"summary": "Good", "unixReviewTime": {1_300_000_000 + rng.randrange(10**8)}, "reviewTime": "01 2, 2013"}}\n'
            )


def write_metadata(path: Path, lines: int) -> None:
    """Python literals of 2.1 kB, two thirds of which are ids of related products."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz'", k=rng.randint(2, 10))) for _ in range(5000)]

    def ids(count: int) -> list[str]:
        return [f"B{rng.randrange(10**9):09d}" for _ in range(count)]

    shared = [
        {
            "related": {"also_bought": ids(55), "also_viewed": ids(45), "bought_together": ids(1)},
            "title": " ".join(rng.choices(words, k=9)),
            "price": 12.99,
            "salesRank": {"Baby": 7},
            "brand": rng.choice(words),
            "imUrl": "http://ecx.images-amazon.com/images/I/51.jpg",
            "categories": [["Baby", rng.choice(words)]],
            "description": " ".join(rng.choices(words, k=50)),
        }
        for _ in range(2000)
    ]
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number in range(lines):
            file.write(f"{ {'asin': f'B{number:09d}', **rng.choice(shared)} }\n")


def measure(kind: str, size: int, folder: Path) -> dict[str, float]:
    """Run one measurement in this process; return what it found."""
    from cm3.datasets.amazon.v2014 import Reader
    from cm3.datasets.k_core import kcore

    spec = {"interactions": "reviews", "malformed": 0.0}
    reader = Reader(spec, {"reviews": folder / "reviews.json.gz", "meta": folder / "meta.json.gz"})
    found: dict[str, float] = {}
    if kind == "kcore":
        rng = np.random.default_rng(0)
        user, item = np.empty(size, np.int32), np.empty(size, np.int32)
        for start in range(0, size, 1_000_000):
            part = slice(start, min(start + 1_000_000, size))
            user[part] = rng.random(part.stop - start) ** 1.5 * size / 8
            item[part] = rng.random(part.stop - start) ** 2 * size / 25
        clock = time.perf_counter()
        found["kept"] = int(kcore(user, item, 5).sum())
    elif kind == "reviews":
        clock = time.perf_counter()
        found["rows"] = sum(len(table) for table in reader.interactions())
    elif kind == "metadata":
        wanted = {f"B{number:09d}" for number in range(0, size, max(1, size // min(WANTED, size // 8)))}
        clock = time.perf_counter()
        found["ids"] = sum(map(len, reader.known_items()))
        found["parsed"] = len(reader.items(wanted))
    else:
        from cm3.datasets.prepare import prepare
        from cm3.datasets.registry import parse_dataset

        data = {"source": "amazon-2014", "category": "Shop", "interactions": "reviews", "folder": str(folder)}
        outputs = {name: folder / f"{name}.parquet" for name in ("ratings", "items", "users")}
        clock = time.perf_counter()
        facts = prepare(
            parse_dataset("shop", data, "").prepare_spec(), reader.inputs, stats=folder / "stats.json", **outputs
        )
        found["interactions"] = facts["interactions"]
    return {**found, "seconds": time.perf_counter() - clock, "peak_mb": peak_memory_mb()}


def main() -> None:
    """Print a table of sizes, seconds, rates and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["reviews", "metadata", "kcore", "prepare"])
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(arguments.kind, arguments.sizes[0], arguments.folder)))
        return
    print(f"| {arguments.kind} | seconds | a second | peak MB | found |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if arguments.kind in ("reviews", "prepare"):
                write_reviews(folder / "reviews.json.gz", size)
            if arguments.kind in ("metadata", "prepare"):
                write_metadata(folder / "meta.json.gz", size if arguments.kind == "metadata" else size // 30)
            command = [sys.executable, __file__, arguments.kind, "--sizes", str(size), "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            seconds, peak = found.pop("seconds"), found.pop("peak_mb")
            print(f"| {size:,} | {seconds:.2f} | {size / seconds:,.0f} | {peak:.0f} | {found} |", flush=True)


if __name__ == "__main__":
    main()
