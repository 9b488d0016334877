"""Parsers of Amazon metadata fields: nested lists, markup, prices, sales ranks, thumbnail URLs."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cm3.datasets.text import image_urls, leaves, plain_text

# "$1,250.00", "from 14.99", "$9.99 - $19.99" (lower end); not the style sheets that some price fields have.
_PRICE = re.compile(r"(?:from\s+)?(?:US)?\s*\$?\s*(\d[\d,]*(?:\.\d+)?)(?:\s*-\s*\$?\s*[\d.,]+)?", re.IGNORECASE)
# "742 in Magazine Subscriptions (", ">#2,893,775 in Toys & Games (See Top 100 in Toys & Games)"
_RANK = re.compile(r"#?\s*(\d[\d,]*)\s+(?:Paid |Free )?in\b")
_LARGEST = 2**31 - 1
# Requested image size in a URL, such as "._SX38_SY50_CR,0,0,38,50_", before the suffix.
_RESIZED = re.compile(r"\._[^/]*_(\.[A-Za-z]+)$")
_IMAGES = 4


def strings(value: Any) -> Iterator[str]:
    """Return the non-empty texts of a text or of nested lists of texts."""
    return (text for text in leaves(value) if isinstance(text, str) and text)


def texts(value: Any) -> list[str]:
    """Return the texts in `value` without markup, without empty ones."""
    return [text for text in map(plain_text, strings(value)) if text]


def pairs(value: Any) -> list[str]:
    """Return "name: value" of each entry of a dictionary."""
    if not isinstance(value, dict):
        return []
    found = ((plain_text(str(name)).rstrip(" :"), " ".join(texts(_shown(entry)))) for name, entry in value.items())
    return [f"{name}: {text}" for name, text in found if name and text]


def _shown(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # an integer with more digits than Python converts
            return str(value)
    return value


def price(value: Any) -> float | None:
    """Return a price as a number (the lower end of a range), or None."""
    if isinstance(value, str):
        found = _PRICE.fullmatch(value.strip())
        value = float(found[1].replace(",", "")) if found else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # Compared before the conversion: an integer of a million digits has no float.
    return float(value) if 0 <= value < 1e9 and not math.isnan(value) else None


def rank(value: Any) -> int | None:
    """Return the first sales rank in {"Baby": 123}, in a number, or in (lists of) texts such as "742 in Magazines"."""
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 < value <= _LARGEST else None
    for text in strings(value):
        found = _RANK.search(text[:1000])
        if found and len(found[1]) < 15 and 0 < (value := int(found[1].replace(",", ""))) <= _LARGEST:
            result: int | None = value
            return result
    return None


def candidate_urls(urls: Sequence[str]) -> list[str]:
    """Return the URLs of an item's first images: full size first, then unchanged, which may be thumbnails."""
    urls = image_urls(urls)
    full = list(dict.fromkeys(_RESIZED.sub(r"\1", url) for url in urls))[:_IMAGES]
    return list(dict.fromkeys([*full, *(url for url in urls if _RESIZED.sub(r"\1", url) in full)]))
