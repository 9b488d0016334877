"""What the readers of the pipeline make of damaged files: noticed, repaired, harmless or silent, by kind of file.

    python benchmarks/damage.py --damages 2000 --seed 0

Each damage changes one file of a tiny run (a bit flipped, a block zeroed, two blocks exchanged, the end cut, all bytes
removed or replaced by noise; two shards exchanged), and the stage's reader reads it in this process. Image shards have
tests of their own.
"""

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cm3.common import tables
from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.features import read_features, write_features
from cm3.common.files import read_json, sha256_of, write_json
from cm3.common.tables import read_metadata, read_table, write_table
from cm3.common.tensors import read_tensors, write_tensors
from cm3.reports.pages.experiment_charts import read_history
from cm3.similarity.incremental import NeighbourLists, read_lists, write_lists
from cm3.training.checkpoint import Checkpoint
from extractors.runtime.cache import DIGEST, OutputCache, set_aside
from extractors.runtime.shards import Shards, with_notes

N = 400
OUTCOMES = ("noticed", "repaired", "harmless", "silent", "traceback")


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        path: a file of this kind.
        read: reads it as its stage does, and returns a value to compare; None if the stage makes it again.
        other: a file that it is exchanged with.
    """

    path: Path
    read: Callable[[], Any]
    other: Path | None = None


def files_of_a_run(folder: Path) -> dict[str, Kind]:
    """Write a file of each kind to `folder`."""
    return {**_tables(folder), **_vectors(folder), **_records(folder), **_unfinished(folder)}


def _tables(folder: Path) -> dict[str, Kind]:
    draw = np.random.default_rng(0)
    ids = [f"B0{n:05d}" for n in range(N)]
    pairs = {"user": draw.integers(0, 60, N), "item": draw.integers(0, N, N), "rating": draw.integers(1, 6, N)}
    split = pa.array(draw.choice(tables.SPLITS, N)).dictionary_encode()
    texts = [f"Thing {n} of the shop" for n in range(N)]
    several = [[text, "red"] for text in texts]
    columns: dict[str, tuple[pa.Schema, dict[str, Any]]] = {
        "interactions": (
            tables.INTERACTIONS,
            pairs | {"timestamp": draw.integers(10**9, 2 * 10**9, N), "split": split},
        ),
        "users": (tables.USERS, {"user": range(60), "user_id": [f"A{n}" for n in range(60)]}),
        "items": (
            tables.ITEMS,
            {
                "item": range(N),
                "item_id": ids,
                **dict.fromkeys(("title", "brand", "description"), texts),
                **dict.fromkeys(("categories", "features", "details", "image_urls"), several),
                "price": draw.random(N),
                "sales_rank": range(N),
            },
        ),
        "captions": (
            tables.CAPTIONS,
            {"item_id": ids, "caption": texts, "status": ["ok"] * N, "error": [None] * N, "tokens": range(N)},
        ),
        "similarity": (
            tables.SIMILARITY,
            {"item": range(N), "neighbour": draw.integers(0, N, N), "score": draw.random(N)},
        ),
        "run_recommendations": (
            tables.RUN_RECOMMENDATIONS,
            {"user": range(N), "item": draw.integers(0, N, N), "rank": range(N), "score": draw.random(N)},
        ),
        "recommendations": (
            tables.RECOMMENDATIONS,
            {"user_id": ids, "item_id": texts, "rank": range(N), "score": draw.random(N)},
        ),
        "per_user": (
            pa.schema([("user", pa.int32()), ("n_test", pa.int32()), ("recall@20", pa.float64())]),
            {"user": range(N), "n_test": draw.integers(1, 9, N), "recall@20": draw.random(N)},
        ),
    }
    found = {}
    for name, (schema, values) in columns.items():
        path = folder / f"{name}.parquet"
        arrays = [pa.array(list(values[field.name])) if field.name != "split" else split for field in schema]
        table = pa.table([array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema)
        write_table(path, table, schema, {"seed": 42, "code": f"{name} 1"})
        found[name] = Kind(path, lambda p=path, s=schema: (read_table(p, s).to_pydict(), read_metadata(p)))
    return found


def _vectors(folder: Path) -> dict[str, Kind]:
    draw = np.random.default_rng(1)
    ids, values = [f"i{n}" for n in range(N)], draw.normal(size=(N, 8)).astype(np.float32)
    features, vectors = folder / "features.parquet", folder / "user_embeddings.parquet"
    write_features(features, ids, values, ["ok"] * N, {"extractor": "words", "dim": 8})
    write_embeddings(vectors, "user_id", ids, values, {"epoch": 3})
    lists, model, weights = folder / "lists.parquet", folder / "model.safetensors", folder / "weights.safetensors"
    keys = pa.array([draw.bytes(32) for _ in range(N)], DIGEST)
    write_lists(
        lists, NeighbourLists(keys, draw.integers(0, N, (N, 6)).astype(np.int32), values[:, :6]), "similarity 1"
    )
    write_tensors(model, {"users": torch.from_numpy(values), "half": torch.ones(9, dtype=torch.bfloat16)}, {"epoch": 3})
    write_tensors(weights, {"weights": torch.from_numpy(values @ values.T)}, {"settings": {"k": 5}})
    checkpoint = Checkpoint(folder / "checkpoints", "f00d")
    state = {"epoch": 3, "step": 1, "history": [{"epoch": 1, "loss": 0.123456789}]}

    def stored_lists() -> Any:
        found = read_lists(lists, "similarity 1")
        return found and (found.keys.to_pylist(), found.indices.tolist(), found.scores.tolist())

    checkpoint.save({"model.users": torch.from_numpy(values), "step": torch.tensor(3.0)}, state)
    return {
        "features": Kind(features, lambda: _features(features)),
        "embeddings": Kind(vectors, lambda: _bytes_and(*read_embeddings(vectors, "user_id", ids))),
        "neighbour lists": Kind(lists, stored_lists),
        "model": Kind(model, lambda: _tensors(*read_tensors(model))),
        "item weights": Kind(weights, lambda: _tensors(*read_tensors(weights))),
        "checkpoint": Kind(checkpoint.path, lambda: (found := checkpoint.load()) and _tensors(*found)),
    }


def _features(path: Path) -> Any:
    found = read_features(path)
    return found.item_ids, found.embedding.tobytes(), found.status.tolist(), found.metadata


def _bytes_and(values: np.ndarray, metadata: Any) -> Any:
    return values.tobytes(), metadata


def _tensors(tensors: dict[str, torch.Tensor], metadata: Any) -> Any:
    return {name: (str(t.dtype), t.tolist()) for name, t in tensors.items()}, metadata


def _records(folder: Path) -> dict[str, Kind]:
    draw = random.Random(2)
    record = {
        "stage": "train",
        "seed": 42,
        "best_valid": draw.random(),
        "versions": {"torch": "2.15"},
        "é": [1.5, None],
    }
    metrics = {f"{name}@{k}": draw.random() for name in ("recall", "ndcg") for k in (10, 20)}
    history = folder / "history.csv"
    history.write_text("epoch,loss\n" + "".join(f"{n},{draw.random()}\n" for n in range(50)))
    digest = sha256_of(history)
    found = {"history": Kind(history, lambda: read_history(history, digest))}
    for name, value in {
        "train.stage": record,
        "evaluation": {"test": metrics},
        "stats": {"data": record | metrics},
    }.items():
        path = folder / f"{name}.json"
        write_json(path, value)
        found[name] = Kind(path, lambda p=path: read_json(p))
    return found


def _unfinished(folder: Path) -> dict[str, Kind]:
    draw = np.random.default_rng(3)
    values, rows = draw.normal(size=(N, 8)).astype(np.float32), np.arange(N)
    digests = pa.array([draw.bytes(32) for _ in range(N)], DIGEST)

    def work(part: np.ndarray) -> pa.Table:
        vectors = pa.array(values[part].tolist(), pa.list_(pa.float32(), 8))
        columns = {"embedding": vectors, "digest": digests.take(pa.array(part)), "status": ["ok"] * len(part)}
        return with_notes(pa.table(columns), {"facts": {"dim": 8}})

    def shards() -> Any:
        found = list(Shards(folder / "f.parquet", "address", ["work"]).run(rows, 100, work))
        return [table.to_pydict() for _, table, _ in found] if all(before for *_, before in found) else None

    made = Shards(folder / "f.parquet", "address", ["work"])
    list(made.run(rows, 100, work))
    cached = folder / ".cache/g/address"
    cached.mkdir(parents=True)
    for path in made.folder.iterdir():
        (cached / path.name).write_bytes(path.read_bytes())

    def outputs() -> Any:
        cache = OutputCache(folder / "g.parquet", "address")
        positions = cache.find(digests)
        if (positions < 0).any():
            return None
        try:
            return sorted((some.tolist(), table.to_pydict()) for some, table in cache.read(rows, positions))
        except DamagedFileError as error:
            set_aside(error)
            return None

    first, second = sorted(made.folder.iterdir())[:2]
    return {"unfinished shard": Kind(first, shards, second), "cached outputs": Kind(cached / first.name, outputs)}


def damaged(content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield kinds of damage and what they make of a file."""
    size = len(content)
    changed = bytearray(content)
    place = draw.randrange(size * 8)
    changed[place // 8] ^= 1 << place % 8
    yield "flipped bit", bytes(changed)
    length = draw.choice([16, 64, 512, 4096])
    start = draw.randrange(max(1, size - length))
    yield "zeroed block", content[:start] + bytes(min(length, size - start)) + content[start + length :]
    yield "cut end", content[: draw.choice([size - 1, size - 8, size // 2, draw.randrange(size)])]
    yield "noise", draw.choice([b"", draw.randbytes(size), content[: size // 2] + draw.randbytes(size - size // 2)])
    one, other = sorted(draw.sample(range(size - 32), 2))
    length = min(draw.choice([32, 512]), other - one, size - other)
    parts = content[:one], content[one : one + length], content[one + length : other], content[other : other + length]
    yield "exchanged blocks", parts[0] + parts[3] + parts[2] + parts[1] + content[other + length :]


class _Warnings(logging.Handler):
    """Notes which paths warnings name."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def outcome(kind: Kind, expected: Any, content: bytes) -> str:
    """Return what the reader of a file makes of `content`; the file has its earlier content afterwards."""
    before = {path: path.read_bytes() for path in (kind.path, kind.other) if path}
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    try:
        if kind.other and content == before[kind.other]:
            kind.other.write_bytes(before[kind.path])
        kind.path.write_bytes(content)
        found = kind.read()
        if found is None:
            return "repaired" if str(kind.path) in warnings.text else "silent"
        return "harmless" if found == expected else "silent"
    except UserError as error:
        return "noticed" if str(kind.path) in str(error) else "traceback"
    except Exception as error:
        logging.getLogger("damage").error("%s: %r", kind.path.name, error)
        return "traceback"
    finally:
        logging.getLogger().removeHandler(warnings)
        for path, whole in before.items():
            path.write_bytes(whole)


def measure(folder: Path, damages: int, seed: int) -> dict[str, Counter[str]]:
    """Return counts of outcomes by kind of file, of about `damages` damaged files written to `folder`."""
    draw, kinds = random.Random(seed), files_of_a_run(folder)
    expected = {name: kind.read() for name, kind in kinds.items()}
    counts: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    while sum(map(Counter.total, counts.values())) < damages:
        for name, kind in kinds.items():
            content = kind.path.read_bytes()
            changes = list(damaged(content, draw))
            if kind.other:
                changes.append(("exchanged files", kind.other.read_bytes()))
            for _, changed in changes:
                counts[name][outcome(kind, expected[name], changed)] += 1
    return counts


def main() -> None:
    """Print a table of outcomes by kind of file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = measure(Path(folder), arguments.damages, arguments.seed)
    print("| file | " + " | ".join(OUTCOMES) + " |\n|---|" + "---|" * len(OUTCOMES))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"| {name} | " + " | ".join(str(found[each]) for each in OUTCOMES) + " |")


if __name__ == "__main__":
    main()
