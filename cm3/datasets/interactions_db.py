"""All interactions of a source on disk: counted, made unique and cut down in bounded memory, by DuckDB."""

import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.datasets.reader import ROWS

log = logging.getLogger("cm3.datasets.interactions_db")

SHOWN = 20
_MEMORY = "800MB"
_FOLDER = ".gathering-"
_ROWS_AT_ONCE = 250_000


@dataclass(frozen=True)
class Interactions:
    """N different (user, item) pairs.

    Attributes:
        user, item: (N,) int32 codes, in the order of the ids.
        rating: (N,) float32, or None where the source has none.
        timestamp: (N,) int64 Unix seconds, or None where the source has none.
        split: (N,) int8, 0 train, 1 valid, 2 test, or None where the source has no labels.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None
    timestamp: np.ndarray | None
    split: np.ndarray | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Interactions":
        """Return the interactions at `rows` (a mask or row numbers)."""
        taken: dict[str, Any] = {name: None if values is None else values[rows] for name, values in vars(self).items()}
        return Interactions(**taken)


class Gathering:
    """Interactions as they are read, in a database in a temporary folder beside `place`.

    Use as a context manager, in this order: `add` everything, `encode`, `drop_repeats`, `apply_policy`, `fetch`.
    """

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        for stale in place.glob(f"{_FOLDER}*"):  # of a killed process; the stage holds a lock
            shutil.rmtree(stale, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place))
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "Gathering":
        # Order is restored by ids at the end, and keeping it meanwhile costs memory.
        settings: dict[str, Any] = {
            "memory_limit": _MEMORY,
            "temp_directory": str(self.folder),
            "preserve_insertion_order": "false",
        }
        self.base = duckdb.connect(str(self.folder / "rows.duckdb"), config=settings)
        self.base.execute(
            "create table raw (user_id varchar, item_id varchar, rating float, timestamp bigint, split tinyint)"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.base.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, duckdb.Error) and "space" in str(error).lower():
            raise UserError(
                f"{self.folder.parent}: no space left on the disk ({error}); make room and run again"
            ) from None

    def add(self, table: pa.Table) -> None:
        """Add interactions, a table of ROWS."""
        if table.schema != ROWS:
            raise ValueError(f"columns {table.schema} are not {ROWS}")
        # Few large insertions: each one costs milliseconds.
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._insert("raw", pa.concat_tables(self._waiting))
            self._waiting.clear()

    def _insert(self, name: str, table: pa.Table) -> None:
        self.base.register("arriving", table)
        self.base.execute(f"insert into {name} select * from arriving")
        self.base.unregister("arriving")

    def encode(self) -> dict[str, int]:
        """Number users and items in the order of their ids; return how many users, items and interactions there are."""
        self._flush()
        for name in ("user", "item"):
            self.base.execute(
                f"create table {name}s as select id, (row_number() over (order by id) - 1)::integer as code "
                f"from (select distinct {name}_id as id from raw)"
            )
        self.base.execute(
            "create table coded as select users.code as user, items.code as item, rating, timestamp, split from raw "
            "join users on users.id = raw.user_id join items on items.id = raw.item_id"
        )
        self.base.execute("drop table raw")
        return self._size("coded")

    def drop_repeats(self) -> dict[str, int]:
        """Keep one row of each (user, item): the first in time, of equal ones the one rated best.

        Returns:
            how many rows went because user, item and timestamp are those of another, and because only the first two.
        """
        self.base.execute(
            "create table pairs as select user, item, count(*) as n, "
            "min((coalesce(timestamp, 0), -coalesce(rating, 0), split, rating, timestamp)) as first "
            "from coded group by user, item"
        )
        equal, pairs = self._one(
            "select coalesce(sum(n - times), 0), coalesce(sum(times - 1), 0) from ("
            "select count(*) as n, count(distinct coalesce(timestamp, 0)) as times from coded semi join "
            "(select user, item from pairs where n > 1) using (user, item) group by user, item)"
        )
        self.base.execute(
            "create table kept as select user, item, first[4] as rating, first[5] as timestamp, first[3] as split from pairs"
        )
        self.base.execute("drop table pairs; drop table coded")
        return {"repeated_rows": int(equal), "repeated_pairs": int(pairs)}

    def apply_policy(self, known: Iterable[list[str]] | None, policy: str) -> dict[str, int | list[str]]:
        """Drop, keep or refuse the interactions of items that are not `known`; None knows all of them.

        Returns:
            the numbers of unknown items and of their interactions, and the first of their ids.

        Raises:
            UserError: there are some, and the policy is `error`.
        """
        if known is None:
            return {"items": 0, "interactions": 0, "first": []}
        self.base.execute("create table known (id varchar)")
        for ids in known:
            self._insert("known", pa.table({"id": pa.array(ids, pa.string())}))
        self.base.execute("create table strange as select code from items anti join known using (id)")
        count, rows = self._one(
            "select (select count(*) from strange), (select count(*) from kept semi join strange on code = item)"
        )
        first = [
            row[0]
            for row in self.base.execute(
                f"select id from items semi join strange using (code) order by code limit {SHOWN}"
            ).fetchall()
        ]
        if count:
            told = f"{count} items with {rows} interactions are not in the item table: {', '.join(first)}"
            told += ", ..." if count > SHOWN else ""
            if policy == "error":
                raise UserError(
                    f"{told}. Add them to it, or set unknown_items: drop, or keep (items without text and image)"
                )
            log.warning("%s (%s by unknown_items: %s)", told, {"drop": "dropped", "keep": "kept"}[policy], policy)
            if policy == "drop":
                self.base.execute(
                    "create or replace table kept as select kept.* from kept anti join strange on code = item"
                )
        return {"items": int(count), "interactions": int(rows), "first": first}

    def size(self) -> dict[str, int]:
        """Return how many users, items and interactions are left."""
        return self._size("kept")

    def fetch(self, k: int) -> Interactions:
        """Return what is left, without most of what the k-core would drop anyway."""
        before, left, table = 0, self._one("select count(*) from kept")[0], "kept"
        # Each round reads everything; what it no longer shrinks much, memory takes.
        while k > 1 and left and not before * 0.8 < left <= before:
            for name in ("user", "item"):
                self.base.execute(
                    f"create or replace temp table pruned as select * from {table} semi join "
                    f"(select {name} from {table} group by {name} having count(*) >= {k}) using ({name})"
                )
                table = "pruned"
            before, left = left, self._one("select count(*) from pruned")[0]
        found = self.base.execute(f"select user, item, rating, timestamp, split from {table}").fetchnumpy()
        whole: dict[str, Any] = {
            name: None if np.ma.is_masked(values) else np.ma.getdata(values) for name, values in found.items()
        }
        return Interactions(**whole)

    def ids(self, name: str, codes: np.ndarray) -> list[str]:
        """Return the ids of `codes` of a "user" or "item", in their order."""
        self.base.register("asked", pa.table({"code": codes, "place": np.arange(len(codes))}))
        return [
            row[0]
            for row in self.base.execute(f"select id from {name}s join asked using (code) order by place").fetchall()
        ]

    def known_ids(self, codes: np.ndarray) -> list[str]:
        """Return all ids of the item table and those of the items `codes`, in order."""
        self.base.register("asked", pa.table({"code": codes}))
        ids = "select id from known union select id from items semi join asked using (code)"
        return [row[0] for row in self.base.execute(f"select id from ({ids}) order by id").fetchall()]

    def _size(self, table: str) -> dict[str, int]:
        counts = self._one(f"select count(distinct user), count(distinct item), count(*) from {table}")
        return dict(zip(("users", "items", "interactions"), map(int, counts), strict=True))

    def _one(self, query: str) -> tuple[int, ...]:
        row = self.base.execute(query).fetchone()
        assert row is not None, query
        return row
