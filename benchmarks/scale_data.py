"""A made-up shop of any size for benchmarks/scale.py: the files that the first stages read, streamed to disk.

    python benchmarks/scale_data.py FOLDER --items 10000 --users 100000 --interactions 1000000 --dim 768 --kcore 5

A process of its own: what runs stages must stay small, or its memory would count as theirs. The log of interactions is
in the order of time; users and items are long-tailed, item number r of I by the power law r^(-2/3). The vectors
lie around I / 60 Gaussian centres with as much noise again: an item's nearest are those of its centre, all at different
cosines near 0.5. Items that nothing is left of after the k-core stay, so that row i of the features is item i.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cm3.common.features import features_schema
from cm3.common.files import read_json, write_json
from cm3.common.tables import OK, ROW_GROUP
from cm3.datasets.registry import parse_dataset

ROWS = 1_000_000
FIRST_DAY, SECONDS = 1_300_000_000, 10**8
ITEMS_PER_CENTRE, SPREAD = 60, 1.0


def named(prefix: str, numbers: np.ndarray, width: int) -> pa.Array:
    """Return ids of Amazon's lengths, whose order is that of the numbers."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(prefix, digits, "")


def write_text(path: Path, tables: list[pa.Table] | map) -> None:
    """Write tables one after the other as one tsv file."""
    writer = None
    options = pa_csv.WriteOptions(delimiter="\t", quoting_style="none")
    for table in tables:
        writer = writer or pa_csv.CSVWriter(path, table.schema, write_options=options)
        writer.write_table(table)
    if writer:
        writer.close()


def write_interactions(path: Path, users: int, items: int, count: int) -> None:
    """Write `count` interactions, a few of them repeats."""
    rng = np.random.default_rng(0)
    by_rank = rng.permutation(items)

    def part(first: int) -> pa.Table:
        n = min(ROWS, count - first)
        columns = {
            "user": named("A", (users * rng.random(n) ** 1.5).astype(np.int64), 13),
            "item": named("B", by_rank[(items * rng.random(n) ** 3).astype(np.int64)], 9),
            "rating": rng.integers(1, 6, n),
            "timestamp": FIRST_DAY + (first + np.arange(n)) * SECONDS // count,
        }
        return pa.table(columns)

    write_text(path, map(part, range(0, count, ROWS)))


def write_items(path: Path, items: int) -> None:
    """Write the table of items: id and title."""
    numbers = np.arange(items)
    titles = pc.binary_join_element_wise("Ware of kind", pa.array(numbers % 997).cast(pa.string()), " ")
    write_text(path, [pa.table({"item_id": named("B", numbers, 9), "title": titles})])


def write_vectors(path: Path, items: int, dim: int) -> None:
    """Write (items, dim) float32 features as `cm3.common.features.write_features` does, a row group at a time."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((max(1, items // ITEMS_PER_CENTRE), dim), np.float32)
    schema = features_schema(dim, "float32").with_metadata({"extractor": json.dumps("scale")})
    storage = {"compression": "zstd", "use_dictionary": ["item_id", "status"], "write_statistics": ["item_id"]}
    with pq.ParquetWriter(path, schema, use_byte_stream_split=["embedding.list.element"], **storage) as writer:
        for first in range(0, items, ROW_GROUP):
            numbers = np.arange(first, min(first + ROW_GROUP, items))
            vectors = rng.standard_normal((len(numbers), dim), np.float32) * np.float32(SPREAD)
            vectors += centres[rng.integers(0, len(centres), len(numbers))]
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=schema.field(1).type)
            status = pa.array([OK] * len(numbers)).dictionary_encode().cast(schema.field(2).type)
            writer.write_table(pa.table([named("B", numbers, 9), embedding, status], schema=schema))


def write_specs(folder: Path, kcore: int, items: int) -> None:
    """Write the specs of prepare and split as the workflow gives them, and the record of an extraction."""
    tables = {
        "interactions": {
            "path": str(folder / "interactions.tsv"),
            "columns": {name: name for name in ("user", "item", "rating", "timestamp")},
        },
        "items": {"path": str(folder / "items.tsv"), "columns": {"item_id": "item_id", "title": "title"}},
    }
    settings = {"source": "files", "kcore": kcore, "cold_items": "keep", **tables}
    dataset = parse_dataset("scale", settings, "datasets.scale")
    write_json(folder / "specs.json", {"prepare": dataset.prepare_spec(), "split": dataset.split_spec()})
    record = {"counts": {"items": items, "ok": items}, "wall_seconds": 0.0, "peak_memory_mb": 0.0, "code": ""}
    write_json(folder / "extract.json", record)


def main() -> None:
    """Write the shop, unless the folder holds the very one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("items", "users", "interactions", "dim", "kcore"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    folder, wanted = arguments.folder, {k: v for k, v in vars(arguments).items() if k != "folder"}
    done = folder / "shop.json"
    if done.exists() and read_json(done) == wanted:
        return
    # What stages made of another shop goes with it.
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    write_interactions(folder / "interactions.tsv", arguments.users, arguments.items, arguments.interactions)
    write_items(folder / "items.tsv", arguments.items)
    write_vectors(folder / "features.parquet", arguments.items, arguments.dim)
    write_specs(folder, arguments.kcore, arguments.items)
    write_json(done, wanted)


if __name__ == "__main__":
    main()
