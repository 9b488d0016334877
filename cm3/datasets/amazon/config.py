"""Config of the Amazon reviews in the three generations in which they were published."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from cm3.datasets.published_config import Published, Url

_IMAGE_HOSTS = (
    "ecx.images-amazon.com",
    "g-ecx.images-amazon.com",
    "images.amazon.com",
    "images-eu.ssl-images-amazon.com",
    "images-na.ssl-images-amazon.com",
    "m.media-amazon.com",
)
_UCSD = (
    "https://mcauleylab.ucsd.edu/public_datasets/data",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data",
)


class _Amazon(Published):
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep", description="as above; published counts include items that the metadata lack, hence the default"
    )

    interactions: str

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the files of interactions, by kind, and the metadata."""
        return {kind: self.place(name, kind) for kind in (*self.interaction_kinds(), "meta")}

    def interaction_kinds(self) -> tuple[str, ...]:
        """Return which of `files` hold the interactions."""
        return (self.interactions,)

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": self.interactions}

    def image_hosts(self) -> list[str]:
        """Return the hosts of Amazon's product images."""
        return list(_IMAGE_HOSTS)


class Amazon2014(_Amazon):
    """A category of the Amazon reviews as published in 2014."""

    source: Literal["amazon-2014"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$",
        description="Baby, Sports_and_Outdoors, Clothing_Shoes_and_Jewelry, Electronics, ...",
    )
    interactions: Literal["ratings", "reviews"] = Field(
        default="ratings",
        description="ratings_X.csv (all ratings), or reviews_X_5.json.gz (reviews, cut to the 5-core already)",
    )
    mirrors: list[Url] = Field(
        default=[
            "https://snap.stanford.edu/data/amazon/productGraph",
            "http://snap.stanford.edu/data/amazon/productGraph",
        ],
        description="roots of the 2014 tree, tried in order; by default at snap.stanford.edu",
    )

    def files(self) -> dict[str, str]:
        """Return the files of the category; the image features are fetched only where an experiment asks for them."""
        return {
            "ratings": f"categoryFiles/ratings_{self.category}.csv",
            "reviews": f"categoryFiles/reviews_{self.category}_5.json.gz",
            "meta": f"categoryFiles/meta_{self.category}.json.gz",
            "image_features": f"image_features/categoryFiles/image_features_{self.category}.b",
        }

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return the raw file of the 4096-d image vectors."""
        return {"vectors": self.place(name, "image_features")} if modality == "image" else {}


class Amazon2018(_Amazon):
    """A category of the Amazon reviews as published in 2018."""

    source: Literal["amazon-2018"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$",
        description="All_Beauty, Gift_Cards, Sports_and_Outdoors, Clothing_Shoes_and_Jewelry, ...",
    )
    interactions: Literal["5core", "ratings", "reviews"] = Field(
        default="5core",
        description="5core: X_5.json.gz (reviews, cut to the 5-core already); ratings: X.csv (all ratings); "
        "reviews: X.json.gz (all reviews)",
    )
    mirrors: list[Url] = Field(
        default=[*(f"{root}/amazon_v2" for root in _UCSD), "https://jmcauley.ucsd.edu/data/amazon_v2"],
        description="roots of the 2018 tree, tried in order; by default three at ucsd.edu",
    )

    def files(self) -> dict[str, str]:
        """Return the files of the category."""
        return {
            "5core": f"categoryFilesSmall/{self.category}_5.json.gz",
            "ratings": f"categoryFilesSmall/{self.category}.csv",
            "reviews": f"categoryFiles/{self.category}.json.gz",
            "meta": f"metaFiles2/meta_{self.category}.json.gz",
        }


class Amazon2023(_Amazon):
    """A category of the Amazon reviews as published in 2023; items are parent ASINs."""

    split_parts: ClassVar[tuple[str, ...]] = ("train", "valid", "test")

    source: Literal["amazon-2023"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$", description="Baby_Products, Sports_and_Outdoors, Electronics, ..."
    )
    interactions: Literal["5core", "5core-timestamp", "5core-last-out", "reviews"] = Field(
        default="5core",
        description="5core: the published 5-core of ratings; 5core-timestamp, 5core-last-out: the same with the published "
        "split by time or by each user's last two; reviews: all reviews",
    )
    mirrors: list[Url] = Field(
        default=[f"{root}/amazon_2023" for root in _UCSD],
        description="roots of the 2023 tree, tried in order; by default two at ucsd.edu",
    )

    def files(self) -> dict[str, str]:
        """Return the files of the category."""
        split = {
            f"{kind}.{part}": f"benchmark/5core/{folder}_w_his/{self.category}.{part}.csv.gz"
            for kind, folder in (("5core-timestamp", "timestamp"), ("5core-last-out", "last_out"))
            for part in self.split_parts
        }
        return {
            "reviews": f"raw/review_categories/{self.category}.jsonl.gz",
            "meta": f"raw/meta_categories/meta_{self.category}.jsonl.gz",
            "5core": f"benchmark/5core/rating_only/{self.category}.csv.gz",
            **split,
        }

    def local_names(self) -> dict[str, str]:
        """Return the names of `files` in one folder; those of the benchmark, equal in the published tree, get a prefix."""
        benchmark = {kind: f"{kind.partition('.')[0]}.{path.rpartition('/')[2]}" for kind, path in self.files().items()}
        return super().local_names() | {kind: file for kind, file in benchmark.items() if kind.startswith("5core")}

    def interaction_kinds(self) -> tuple[str, ...]:
        """Return which of `files` hold the interactions: three where they are split."""
        if self.has_labels():
            return tuple(f"{self.interactions}.{part}" for part in self.split_parts)
        return (self.interactions,)

    def has_labels(self) -> bool:
        """Whether the interactions are those of a published split."""
        return self.interactions in ("5core-timestamp", "5core-last-out")
