"""DuckDB database of a source's interactions: ids encoded, duplicates removed, filtered, in bounded memory."""

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
from cm3.common.files import writing
from cm3.common.limits import Limits
from cm3.datasets.reader import ROWS

log = logging.getLogger("cm3.datasets.interactions_db")

IDS_SHOWN = 20
_PLAIN = "ltrim(lower(nfc_normalize(trim(id, ' ' || chr(9) || chr(13) || chr(160) || chr(8203) || chr(65279)))), '0')"
"""SQL of an id without case, leading zeros and white space around it, to find ids that are written differently."""
_FOLDER = ".interactions-"
_ROWS_AT_ONCE = 250_000
_NO_ROOM = ("space", "quota", "file too large", "could not write")
"""What DuckDB says where a disk is full."""
_NO_LIMITS = Limits()
_UNKNOWN = {"rating": np.nan, "timestamp": 0}


@dataclass(frozen=True)
class InteractionArrays:
    """N distinct (user, item) pairs.

    Attributes:
        user, item: (N,) int32 codes, in the order of the ids.
        rating: (N,) float32, NaN where unknown, or None if no interaction has one.
        timestamp: (N,) int64 Unix seconds, 0 where unknown, or None if no interaction has one.
        split: (N,) int8, 0 train, 1 valid, 2 test, or None if the source has no published split.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None
    timestamp: np.ndarray | None
    split: np.ndarray | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "InteractionArrays":
        """Return the interactions at `rows` (a mask or row numbers)."""
        taken: dict[str, Any] = {name: None if values is None else values[rows] for name, values in vars(self).items()}
        return InteractionArrays(**taken)


class InteractionsDatabase:
    """Interactions of a source, in a database in a temporary folder inside `folder`.

    Use as a context manager, in this order: `add` everything, `encode`, `drop_duplicates`, `apply_policy`, `fetch`.

    Attributes:
        base: the connection.
        folder: the temporary folder.
    """

    def __init__(self, folder: Path, limits: Limits = _NO_LIMITS) -> None:
        self._limits = limits
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{_FOLDER}*"):  # of a killed process; the stage holds a lock
                shutil.rmtree(stale, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=folder))
        self._batches: list[pa.Table] = []

    def __enter__(self) -> "InteractionsDatabase":
        # The order is restored by ids at the end; keeping it costs memory.
        settings: dict[str, Any] = {
            **self._limits.duckdb(),
            "temp_directory": str(self.folder),
            "preserve_insertion_order": "false",
        }
        try:
            self.base = duckdb.connect(str(self.folder / "rows.duckdb"), config=settings)
            self.base.execute(
                "create table raw (user_id varchar, item_id varchar, rating float, timestamp bigint, split tinyint)"
            )
        except duckdb.Error as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._report_full_disk(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.base.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._report_full_disk(error)

    def _report_full_disk(self, error: BaseException | None) -> None:
        if isinstance(error, duckdb.Error) and any(words in str(error).lower() for words in _NO_ROOM):
            raise UserError(
                f"{self.folder.parent}: no space left on the disk ({error}); free some space and run again"
            ) from None

    def add(self, table: pa.Table) -> None:
        """Add a table of ROWS."""
        if table.schema != ROWS:
            raise ValueError(f"columns {table.schema} are not {ROWS}")
        # In large batches: each insertion costs milliseconds.
        self._batches.append(table)
        if sum(map(len, self._batches)) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._batches:
            self._insert("raw", pa.concat_tables(self._batches))
            self._batches.clear()

    def _insert(self, name: str, table: pa.Table) -> None:
        self.base.register("batch", table)
        self.base.execute(f"insert into {name} select * from batch")
        self.base.unregister("batch")

    def encode(self) -> dict[str, int]:
        """Number users and items in the order of their ids; return the numbers of users, items and interactions."""
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

    def drop_duplicates(self) -> dict[str, int]:
        """Keep one row of each (user, item) pair: the first in time, at equal times the highest rating.

        Returns:
            the numbers of removed rows: with user, item and timestamp of another row, and with user and item only.
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
            "create table distinct_pairs as select user, item, first[4] as rating, first[5] as timestamp, first[3] as split from pairs"
        )
        self.base.execute("drop table pairs; drop table coded")
        return {"repeated_rows": int(equal), "repeated_pairs": int(pairs)}

    def apply_policy(self, known: Iterable[list[str]] | None, policy: str) -> dict[str, int | list[str]]:
        """Drop, keep or reject interactions with items that are not `known`; None: all items are known.

        Returns:
            the number of unknown items, the number of their interactions, and their first ids.

        Raises:
            UserError: there are unknown items and the policy is `error`, or ids of unknown items equal those of known ones
                except for a ".0".
        """
        if known is None:
            return {"items": 0, "interactions": 0, "first": []}
        self.base.execute("create table known (id varchar)")
        for ids in known:
            self._insert("known", pa.table({"id": pa.array(ids, pa.string())}))
        self.base.execute("create table unknown as select code from items anti join known using (id)")
        count, rows = self._one(
            "select (select count(*) from unknown), (select count(*) from distinct_pairs semi join unknown on code = item)"
        )
        first = [
            row[0]
            for row in self.base.execute(
                f"select id from items semi join unknown using (code) order by code limit {IDS_SHOWN}"
            ).fetchall()
        ]
        if count:
            self._check_floats()
            message = f"{count} items with {rows} interactions are not in the item table: {', '.join(first)}"
            message += ", ..." if count > IDS_SHOWN else ""
            message += self._alike()
            items, known_count = self._one(
                "select (select count(*) from items), (select count(distinct id) from known)"
            )
            if count == items and known_count:
                message += f"; no id of the interactions is in it. {self._both_sides()}{self._exchanged()}"
            if policy == "error":
                raise UserError(
                    f"{message}. Add them to it, or set unknown_items: drop, or keep (items without text and image)"
                )
            log.warning("%s (%s by unknown_items: %s)", message, {"drop": "dropped", "keep": "kept"}[policy], policy)
            if policy == "drop":
                self.base.execute(
                    "create or replace table distinct_pairs as select distinct_pairs.* from distinct_pairs anti join unknown on code = item"
                )
        return {"items": int(count), "interactions": int(rows), "first": first}

    def _alike(self) -> str:
        """Return how many unknown ids are known in another spelling, with an example; empty if none is."""
        row = self.base.execute(
            f"select unknown_id, known_id, count(distinct unknown_id) over () from "
            f"(select id as unknown_id, {_PLAIN} as plain from items semi join unknown using (code)) "
            f"join (select id as known_id, {_PLAIN} as plain from known) using (plain) where plain != '' "
            "order by unknown_id, known_id limit 1"
        ).fetchone()
        if row is None:
            return ""
        return f"; {row[2]} of them differ from ids in it by case, zeros or white space alone, such as {row[0]!r} and {row[1]!r}"

    def _exchanged(self) -> str:
        found = self._one("select count(*) from users semi join known using (id)")[0]
        return f". {found} ids of users are in it: are the columns of user and item exchanged?" if found else ""

    def _both_sides(self) -> str:
        """Return three ids of each table, for the message that they have none in common."""
        of_interactions, of_items = (
            ", ".join(repr(row[0]) for row in self.base.execute(query).fetchall())
            for query in (
                "select id from items order by id limit 3",
                "select distinct id from known order by id limit 3",
            )
        )
        return f"Ids of the interactions: {of_interactions}; of the item table: {of_items}"

    def _check_floats(self) -> None:
        row = self.base.execute(
            "select unknown_id, known.id, count(*) over () from (select id as unknown_id from items semi join unknown using (code)) "
            "join known on known.id || '.0' = unknown_id or known.id = unknown_id || '.0' order by unknown_id limit 1"
        ).fetchone()
        if row:
            raise UserError(
                f"{row[2]} item ids are written as floats in one table and as integers in the other, such as {row[0]!r} in "
                f"the interactions and {row[1]!r} in the item table; write them alike (in pandas: .astype('Int64'))"
            )

    def size(self) -> dict[str, int]:
        """Return the numbers of users, items and interactions that remain."""
        return self._size("distinct_pairs")

    def fetch(self, k: int) -> InteractionArrays:
        """Return the remaining interactions, without most of those that k-core filtering would remove anyway."""
        before, left, table = 0, self._one("select count(*) from distinct_pairs")[0], "distinct_pairs"
        # Each round reads everything; stop when a round removes less than a fifth.
        while k > 1 and left and not before * 0.8 < left <= before:
            for name in ("user", "item"):
                self.base.execute(
                    f"create or replace temp table pruned as select * from {table} semi join "
                    f"(select {name} from {table} group by {name} having count(*) >= {k}) using ({name})"
                )
                table = "pruned"
            before, left = left, self._one("select count(*) from pruned")[0]
        found = self.base.execute(f"select user, item, rating, timestamp, split from {table}").fetchnumpy()
        columns: dict[str, Any] = {name: _known(name, values) for name, values in found.items()}
        return InteractionArrays(**columns)

    def ids(self, name: str, codes: np.ndarray) -> list[str]:
        """Return the ids of the codes of a "user" or "item", in the same order."""
        self.base.register("requested", pa.table({"code": codes, "place": np.arange(len(codes))}))
        return [
            row[0]
            for row in self.base.execute(
                f"select id from {name}s join requested using (code) order by place"
            ).fetchall()
        ]

    def known_ids(self, codes: np.ndarray) -> list[str]:
        """Return all ids of the item table and the ids of the items `codes`, sorted."""
        self.base.register("requested", pa.table({"code": codes}))
        ids = "select id from known union select id from items semi join requested using (code)"
        return [row[0] for row in self.base.execute(f"select id from ({ids}) order by id").fetchall()]

    def _size(self, table: str) -> dict[str, int]:
        counts = self._one(f"select count(distinct user), count(distinct item), count(*) from {table}")
        return dict(zip(("users", "items", "interactions"), map(int, counts), strict=True))

    def _one(self, query: str) -> tuple[int, ...]:
        row = self.base.execute(query).fetchone()
        assert row is not None, query
        return row


def _known(name: str, values: Any) -> np.ndarray | None:
    """Return a column with unknown ratings and times filled in, None if all values are unknown."""
    unknown = int(np.ma.getmaskarray(values).sum())
    if unknown == len(values) and unknown:
        return None
    if unknown:
        log.warning("%d of %d interactions have no %s; it counts as unknown", unknown, len(values), name)
    found: np.ndarray = np.ma.filled(values, _UNKNOWN.get(name)) if unknown else np.ma.getdata(values)
    return found
