"""Reader of the Amazon files of 2014: ratings or reviews, metadata as Python literals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.datasets.amazon.fields import price, rank, strings, texts
from cm3.datasets.amazon.metadata import AmazonReader
from cm3.datasets.amazon.reviews import Names, read_ratings, read_reviews
from cm3.datasets.reader import Item
from cm3.datasets.text import image_urls

_REVIEW = Names("reviewerID", "asin", "overall", "unixReviewTime")
_RATING = Names("user", "item", "rating", "timestamp")


class Reader(AmazonReader):
    """Reads `amazon-2014` data sets. Spec: interactions, "ratings" (csv) or "reviews" (JSON lines); malformed."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        super().__init__(spec, inputs, "asin", item_of)

    def interactions(self) -> Iterator[pa.Table]:
        """Read ratings_X.csv (user, item, rating, time; no header) or reviews_X_5.json.gz."""
        path, malformed = self.inputs[self.spec["interactions"]], self.spec["malformed"]
        if self.spec["interactions"] == "reviews":
            return read_reviews(path, _REVIEW, malformed, self.notes)
        return read_ratings(path, _RATING, malformed, self.notes, header=_RATING)


def item_of(record: dict[str, Any]) -> Item:
    """Return the item of a parsed metadata line."""
    return Item(
        title=" ".join(texts(record.get("title"))),
        brand=" ".join(texts(record.get("brand"))),
        categories=list(dict.fromkeys(texts(record.get("categories")))),
        description=" ".join(texts(record.get("description"))),
        price=price(record.get("price")),
        sales_rank=rank(record.get("salesRank")),
        image_urls=image_urls(strings(record.get("imUrl"))),
    )
