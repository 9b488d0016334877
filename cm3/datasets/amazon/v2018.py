"""Reader of the Amazon files of 2018: ratings or reviews, metadata in two schemas with markup and duplicates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.datasets.amazon.fields import candidate_urls, pairs, price, rank, strings, texts
from cm3.datasets.amazon.metadata import AmazonReader
from cm3.datasets.amazon.reviews import Names, read_ratings, read_reviews
from cm3.datasets.reader import Item

_REVIEW = Names("reviewerID", "asin", "overall", "unixReviewTime")
_RATING = Names("user", "item", "rating", "timestamp")
_RATING_HEADER = ("item", "user", "rating", "timestamp")


class Reader(AmazonReader):
    """Reads `amazon-2018` data sets. Spec: interactions, "5core", "reviews" (JSON lines) or "ratings" (csv)."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        super().__init__(spec, inputs, "asin", item_of)

    def interactions(self) -> Iterator[pa.Table]:
        """Read X_5.json.gz or X.json.gz, or X.csv (item, user, rating, time; no header)."""
        path, malformed = self.inputs[self.spec["interactions"]], self.spec["malformed"]
        if self.spec["interactions"] == "ratings":
            return read_ratings(path, _RATING, malformed, self.notes, header=_RATING_HEADER)
        return read_reviews(path, _REVIEW, malformed, self.notes)


def item_of(record: dict[str, Any]) -> Item:
    """Return the item of a parsed metadata line, in the schema with `image` or with `imageURL` and `imageURLHighRes`.

    Full-size images come first; the URL of a full-size image follows from the URL of its thumbnail.
    """
    images = [url for name in ("imageURLHighRes", "imageURL", "image") for url in strings(record.get(name))]
    return Item(
        title=" ".join(texts(record.get("title"))),
        brand=" ".join(texts(record.get("brand"))).removeprefix("by ").strip(),
        categories=list(dict.fromkeys(texts(record.get("category") or record.get("categories")))),
        description=" ".join(dict.fromkeys(texts(record.get("description")))),
        features=list(dict.fromkeys(texts(record.get("feature") or record.get("features")))),
        details=pairs(record.get("details")),
        price=price(record.get("price")),
        sales_rank=rank(record.get("rank")),
        image_urls=candidate_urls(images),
    )
