"""Texts of Amazon reviews: the headline and the body of each, in files of one JSON object per line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.datasets.amazon.metadata import parse
from cm3.datasets.amazon.reviews import Names, values_of
from cm3.datasets.files.lines import line_blocks
from cm3.datasets.reader import interaction_table
from cm3.datasets.text import plain_text


def read_texts(spec: dict[str, Any], inputs: dict[str, Path]) -> Iterator[pa.Table]:
    """Yield tables of user, item, rating, timestamp and text; malformed lines, which `prepare` counts, are skipped.

    Args:
        spec: names (of user, item, rating and timestamp) and texts (of headline and body).
        inputs: reviews.

    Raises:
        UserError: a damaged file.
    """
    names = Names(*spec["names"])
    for _, block in line_blocks(inputs["reviews"]):
        rows, texts = [], []
        for line in block:
            review = parse(line)
            if review is None:
                continue
            try:
                rows.append(values_of(review, names))
            except ValueError:
                continue
            values = (review.get(name) for name in spec["texts"])
            texts.append("\n".join(text for text in (plain_text(v) for v in values if isinstance(v, str)) if text))
        user, item, rating, time = zip(*rows, strict=True) if rows else ((), (), (), ())
        table = interaction_table(
            pa.array(user, pa.string()), pa.array(item, pa.string()), pa.array(rating), pa.array(time)
        )
        yield table.drop_columns(["split"]).append_column("text", pa.array(texts, pa.string()))
