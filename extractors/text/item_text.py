"""Texts of items, assembled from their fields; items without any text are missing."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cm3.common.errors import UserError
from cm3.common.tables import CAPTIONS, FAILED, ITEMS, OK, read_table
from extractors.runtime.source import Source, digests_of, statuses

Field = Literal["title", "brand", "categories", "description", "features", "details"]
FIELDS: tuple[Field, ...] = ("title", "brand", "categories", "description", "features")
"""Default fields of the text: one line per field in this order, lists joined by commas, empty fields omitted."""

# Whitespace, and control characters, which no tokenizer uses.
_BLANK = re.compile(r"[\s\x00-\x1f\x7f]+")


def clean(value: Any) -> str:
    """Return a field's value as one line: whitespace and control characters collapsed, lists joined by commas."""
    if value is None:
        return ""
    if isinstance(value, str):
        # Tokenizers do not accept lone surrogates.
        return _BLANK.sub(" ", value.encode("utf-8", "replace").decode("utf-8")).strip()
    if isinstance(value, Iterable):
        return ", ".join(text for text in map(clean, value) if text)
    return clean(str(value))


def item_text(item: Mapping[str, Any], fields: Iterable[str] = FIELDS) -> str | None:
    """Return an item's text: one line per field in the given order; None if all fields are empty."""
    return "\n".join(text for text in (clean(item.get(field)) for field in fields) if text) or None


def read_texts(items: Path, fields: list[Field]) -> Source[str]:
    """Return the texts of items.parquet as inputs."""
    table = read_table(items, ITEMS, ["item_id", *fields])
    return _source(table.column("item_id").to_pylist(), [item_text(row, fields) for row in table.to_pylist()])


def read_captions(items: Path, captions: Path) -> Source[str]:
    """Return the captions of captions.parquet as inputs; a failed caption is a failed input.

    Raises:
        UserError: the captions belong to other items.
    """
    ids: list[str] = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    table = read_table(captions, CAPTIONS)
    if table.column("item_id").to_pylist() != ids:
        raise UserError(f"{captions}: its item ids are not those of {items}; delete it and run again")
    texts = [clean(caption) or None for caption in table.column("caption").to_pylist()]
    status = table.column("status").to_pylist()
    source = _source(ids, [text if state == OK else None for text, state in zip(texts, status, strict=True)])
    for row, (state, error) in enumerate(zip(status, table.column("error").to_pylist(), strict=True)):
        if state == FAILED:
            source.status[row], source.errors[row] = FAILED, error or "no caption"
    return source


def _source(ids: list[str], texts: list[str | None]) -> Source[str]:
    status = statuses(text is not None for text in texts)
    return Source(
        item_ids=ids,
        status=status,
        rows=np.flatnonzero(status == OK),
        stream=lambda rows: (texts[row] or "" for row in rows),
        digests=digests_of(texts),
    )
