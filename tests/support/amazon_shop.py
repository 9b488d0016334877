"""Small shops in the formats of the Amazon files, and the prepare stage on them."""

import gzip
import json
from pathlib import Path
from typing import Any

from cm3.common.tables import ITEMS, read_table
from cm3.datasets.prepare import prepare
from cm3.datasets.registry import parse_dataset

CATEGORY = {"amazon-2014": "Baby", "amazon-2018": "Gift_Cards", "amazon-2023": "Baby_Products"}


def review(user: Any, item: Any, rating: Any = 4.0, time: Any = 1_400_000_000, **more: Any) -> str:
    """A review as of 2014 and 2018."""
    return json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time, **more})


def review_2023(user: str, item: str, rating: float = 4.0, time: int = 1_600_000_000_123) -> str:
    return json.dumps({"user_id": user, "parent_asin": item, "asin": "variant", "rating": rating, "timestamp": time})


def literal(item: str, **fields: Any) -> str:
    """Metadata as of 2014."""
    return repr({"asin": item, "title": f"Thing {item}", **fields})


def pack(path: Path, lines: list[str | bytes]) -> Path:
    """Write lines to a file, gzip by its suffix."""
    text = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def run(folder: Path, source: str, files: dict[str, list[Any]], **settings: Any) -> dict[str, Any]:
    """Write the files by kind (`meta`, `reviews`, ...) as published and prepare them; tables go to `folder`."""
    data = {"source": source, "category": CATEGORY[source], "folder": str(folder / "published"), **settings}
    config = parse_dataset("shop", data, "datasets.shop")
    for kind, lines in files.items():
        pack(folder / "published" / config.files()[kind], lines)
    inputs = {name: Path(path) for name, path in config.prepare_inputs("shop").items()}
    outputs = {name: folder / f"{name}.parquet" for name in ("ratings", "items", "users")}
    return prepare(config.prepare_spec(), inputs, stats=folder / "stats.json", **outputs)


def items_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of items.parquet by id."""
    return {row["item_id"]: row for row in read_table(folder / "items.parquet", ITEMS).to_pylist()}


TABLES = ("ratings", "items", "users")
MANY = [review(f"A{u}", f"B{i}", time=1_400_000_000 + i) for u in range(20) for i in range(20)]
THINGS = [literal(f"B{i}") for i in range(20)]


def tables(folder: Path) -> list[bytes]:
    return [(folder / f"{name}.parquet").read_bytes() for name in TABLES]
