"""Reader of the Amazon files of 2023: reviews or published 5-cores with splits, metadata by parent ASIN."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from cm3.datasets.amazon.fields import pairs, price, strings, texts
from cm3.datasets.amazon.metadata import AmazonReader
from cm3.datasets.amazon.reviews import Names, read_ratings, read_reviews
from cm3.datasets.reader import Item
from cm3.datasets.text import image_urls

_NAMES = Names("user_id", "parent_asin", "rating", "timestamp")
_LABELS = {"train": 0, "valid": 1, "test": 2}
_CANDIDATES = 8
_SIZES = ("large", "hi_res")


class Reader(AmazonReader):
    """Reads `amazon-2023` data sets. Inputs: meta, and `reviews`, `5core`, or three files KIND.train, .valid, .test."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        super().__init__(spec, inputs, "parent_asin", item_of)

    def interactions(self) -> Iterator[pa.Table]:
        """Read the reviews, the ratings, or the three files of a published split."""
        for name, path in self.inputs.items():
            if name == "meta":
                continue
            notes: dict[str, int] = {}
            if name == "reviews":
                yield from read_reviews(path, _NAMES, self.spec["malformed"], notes)
            else:
                label = _LABELS.get(name.rpartition(".")[2])
                yield from read_ratings(path, _NAMES, self.spec["malformed"], notes, split=label)
            for reason, count in notes.items():
                self.notes[reason] = self.notes.get(reason, 0) + count


def item_of(record: dict[str, Any]) -> Item:
    """Return the item of a parsed metadata line.

    The brand is the name of the store. Images: variant MAIN first; of each variant the large size (500 pixels), then the
    high resolution; thumbnails only if there are no others.
    """
    details = record.get("details")
    if isinstance(details, str):
        details = _parsed(details)
    brand = texts(record.get("store")) or texts(details.get("Brand") if isinstance(details, dict) else None)
    return Item(
        title=" ".join(texts(record.get("title"))),
        brand=" ".join(brand),
        categories=list(dict.fromkeys(texts(record.get("categories")) or texts(record.get("main_category")))),
        description=" ".join(dict.fromkeys(texts(record.get("description")))),
        features=list(dict.fromkeys(texts(record.get("features")))),
        details=pairs(details),
        price=price(record.get("price")),
        sales_rank=None,
        image_urls=_images(record.get("images")),
    )


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        return None


def _images(images: Any) -> list[str]:
    if isinstance(images, dict):  # stored by columns: {"large": [...], "variant": [...]}
        columns = {name: values for name, values in images.items() if isinstance(values, list)}
        length = max(map(len, columns.values()), default=0)
        images = [{name: v[n] for name, v in columns.items() if n < len(v)} for n in range(length)]
    variants = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    variants.sort(key=lambda image: image.get("variant") != "MAIN")
    found = image_urls(url for image in variants for size in _SIZES for url in strings(image.get(size)))
    thumbnails = image_urls(url for image in variants for url in strings(image.get("thumb")))
    return list(dict.fromkeys(found or thumbnails))[:_CANDIDATES]
