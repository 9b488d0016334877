"""Ids and interactions of the caller, in any of the usual containers -> text, and rows of the model."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from cm3.common.ids import id_text, missing_id
from cm3.common.strict import nearest
from cm3.common.values import shown

_COMPARED = 20_000  # valid ids that a misspelt one is compared with


def is_one_id(values: Any) -> bool:
    """Return whether `values` is one id (text or a number), not a list of ids."""
    return isinstance(values, str | bytes | int | float | np.generic) or getattr(values, "ndim", None) == 0


def id_texts(values: Any, where: str) -> list[str]:
    """Return ids as text. Raises ValueError with the row of one that is missing or neither text nor a whole number."""
    if is_one_id(values):
        raise ValueError(f"{where} = {values!r}: is one id; give a list of ids")
    texts = []
    for row, value in enumerate(_python_values(values)):
        try:
            text = id_text(value)
        except ValueError as error:
            raise ValueError(f"{where}, row {row}: {shown(value)} {error}") from None
        if text is None:
            raise ValueError(f"{where}, row {row}: {shown(value)} {missing_id(value)}; remove the row or give it an id")
        texts.append(text)
    return texts


def _python_values(values: Any) -> Sequence[Any]:
    """Return the values of a list, or of a column or array of pyarrow, pandas, polars, NumPy or torch."""
    for method in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, method):
            found: Sequence[Any] = getattr(values, method)()
            return found
    return list(values)


def id_columns(interactions: Mapping[str, Sequence[Any]], where: str = "interactions") -> tuple[list[str], list[str]]:
    """Return the columns `user` and `item` of a table as text. Raises ValueError for missing ids or columns."""
    users, items = (id_texts(_column(interactions, name, where), f"{where}[{name!r}]") for name in ("user", "item"))
    if len(users) != len(items):
        raise ValueError(f"{where}: {len(users)} users and {len(items)} items")
    if not users:
        raise ValueError(f"{where}: has no rows")
    return users, items


def _column(table: Mapping[str, Any], name: str, where: str) -> Any:
    names = getattr(table, "column_names", None) or list(getattr(table, "columns", ()))
    if names.count(name) > 1:
        raise ValueError(f"{where}: duplicate column {name!r}; rename one of them")
    # Asked before it is taken, because libraries of tables raise errors of their own.
    if name not in (names or table):
        raise ValueError(f"{where}: has no column {name!r}{nearest(name, names or table)}")
    return table[name]


def places(ids: Sequence[str], kind: str) -> dict[str, int]:
    """Return the row of each id. Raises ValueError if an id is duplicated; `kind` is user or item."""
    found = {name: place for place, name in enumerate(ids)}
    if len(found) < len(ids):
        raise ValueError(f"duplicate {kind} ids: {len(ids)} ids, {len(found)} different ones")
    return found


def known_rows(wanted: Sequence[str], known: Mapping[str, int]) -> np.ndarray:
    """Return the rows of ids, (N,) int64; -1 for those that are not known."""
    return np.fromiter((known.get(name, -1) for name in wanted), np.int64, len(wanted))


def rows_of(wanted: Sequence[str], known: Mapping[str, int], kind: str) -> np.ndarray:
    """Return the rows of ids, (N,) int64. Raises ValueError with the first unknown id and the nearest known one."""
    rows = known_rows(wanted, known)
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        more = f"; {len(unknown)} unknown ids in all" if len(unknown) > 1 else ""
        name = wanted[int(unknown[0])]
        raise ValueError(f"{kind} {name!r} is unknown{_nearest_id(name, known)}{more}")
    return rows


def _nearest_id(name: str, known: Mapping[str, int]) -> str:
    some = [other for other, _ in zip(known, range(_COMPARED), strict=False)]
    close = difflib.get_close_matches(name, some, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" among {len(known)} ids"


def pair_matrix(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Return (U, I) float32, 1 at each pair; repeats count once."""
    matrix = sp.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix
