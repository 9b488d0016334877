"""Settings of the Amazon review datasets of 2014, 2018 and 2023."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from cm3.datasets.images.alternatives import AMAZON_HOSTS
from cm3.datasets.published import PublishedSource, Url

_UCSD = (
    "https://mcauleylab.ucsd.edu/public_datasets/data",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data",
)


class _AmazonSpec(PublishedSource):
    version = 1
    libraries = ("orjson",)

    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep",
        description="As for every dataset. Default keep: the published counts include items without metadata.",
    )

    review_reader = "cm3.datasets.amazon.review_texts:read_texts"
    review_names: ClassVar[tuple[str, ...]] = ("reviewerID", "asin", "overall", "unixReviewTime")
    review_texts: ClassVar[tuple[str, ...]] = ("summary", "reviewText")

    interactions: str

    def review_kind(self) -> str:
        """Return the key of `files` with the texts of reviews."""
        return "reviews"

    def review_inputs(self, name: str) -> dict[str, str]:
        """Return the file with the texts of reviews."""
        return {"reviews": self.place(name, self.review_kind())}

    def reviews_spec(self) -> dict[str, Any]:
        """Return the spec of the reviews stage: the names of the fields."""
        return {**super().reviews_spec(), "names": list(self.review_names), "texts": list(self.review_texts)}

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the interaction files by kind, and the metadata."""
        return {kind: self.place(name, kind) for kind in (*self.interaction_kinds(), "meta")}

    def interaction_kinds(self) -> tuple[str, ...]:
        """Return the keys of `files` with the interactions."""
        return (self.interactions,)

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": self.interactions}

    def image_hosts(self) -> list[str]:
        """Return the hosts of Amazon's product images."""
        return list(AMAZON_HOSTS)


class Amazon2014Spec(_AmazonSpec):
    """A category of the Amazon reviews of 2014."""

    reader = "cm3.datasets.amazon.v2014:Reader"

    source: Literal["amazon-2014"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$",
        description="Category in the file names: Baby, Sports_and_Outdoors, Clothing_Shoes_and_Jewelry, Electronics, ...",
    )
    interactions: Literal["ratings", "reviews"] = Field(
        default="ratings",
        description="ratings: ratings_X.csv (all ratings); reviews: reviews_X_5.json.gz (reviews of the 5-core).",
    )
    mirrors: list[Url] = Field(
        default=[
            "https://snap.stanford.edu/data/amazon/productGraph",
            "http://snap.stanford.edu/data/amazon/productGraph",
        ],
        description="Base URLs of the 2014 files, tried in order; default: snap.stanford.edu.",
    )

    def files(self) -> dict[str, str]:
        """Return the files of the category; image features are downloaded only if an experiment uses them."""
        return {
            "ratings": f"categoryFiles/ratings_{self.category}.csv",
            "reviews": f"categoryFiles/reviews_{self.category}_5.json.gz",
            "meta": f"categoryFiles/meta_{self.category}.json.gz",
            "image_features": f"image_features/categoryFiles/image_features_{self.category}.b",
        }

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return the file of the 4096-d image vectors."""
        return {"vectors": self.place(name, "image_features")} if modality == "image" else {}


class Amazon2018Spec(_AmazonSpec):
    """A category of the Amazon reviews of 2018."""

    reader = "cm3.datasets.amazon.v2018:Reader"

    source: Literal["amazon-2018"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$",
        description="Category in the file names: All_Beauty, Gift_Cards, Sports_and_Outdoors, Clothing_Shoes_and_Jewelry, ...",
    )
    interactions: Literal["5core", "ratings", "reviews"] = Field(
        default="5core",
        description="5core: X_5.json.gz (reviews of the 5-core); ratings: X.csv (all ratings); reviews: X.json.gz (all "
        "reviews).",
    )
    mirrors: list[Url] = Field(
        default=[*(f"{root}/amazon_v2" for root in _UCSD), "https://jmcauley.ucsd.edu/data/amazon_v2"],
        description="Base URLs of the 2018 files, tried in order; default: three at ucsd.edu.",
    )

    def files(self) -> dict[str, str]:
        """Return the files of the category."""
        return {
            "5core": f"categoryFilesSmall/{self.category}_5.json.gz",
            "ratings": f"categoryFilesSmall/{self.category}.csv",
            "reviews": f"categoryFiles/{self.category}.json.gz",
            "meta": f"metaFiles2/meta_{self.category}.json.gz",
        }

    def review_kind(self) -> str:
        """Return the key of the reviews of the 5-core, or of all reviews."""
        return "5core" if self.interactions == "5core" else "reviews"


class Amazon2023Spec(_AmazonSpec):
    """A category of the Amazon reviews of 2023; items are parent ASINs."""

    reader = "cm3.datasets.amazon.v2023:Reader"
    split_parts: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    review_names = ("user_id", "parent_asin", "rating", "timestamp")
    review_texts = ("title", "text")

    source: Literal["amazon-2023"]
    category: str = Field(
        pattern=r"^[A-Z][A-Za-z_]*$",
        description="Category in the file names: Baby_Products, Sports_and_Outdoors, Electronics, ...",
    )
    interactions: Literal["5core", "5core-timestamp", "5core-last-out", "reviews"] = Field(
        default="5core",
        description="5core: ratings of the published 5-core; 5core-timestamp, 5core-last-out: the same with the published "
        "global-time or leave-one-out split; reviews: all reviews.",
    )
    mirrors: list[Url] = Field(
        default=[f"{root}/amazon_2023" for root in _UCSD],
        description="Base URLs of the 2023 files, tried in order; default: two at ucsd.edu.",
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
        """Return the names of `files` in one folder; benchmark files get a prefix, as their published names are equal."""
        benchmark = {kind: f"{kind.partition('.')[0]}.{path.rpartition('/')[2]}" for kind, path in self.files().items()}
        return super().local_names() | {kind: file for kind, file in benchmark.items() if kind.startswith("5core")}

    def interaction_kinds(self) -> tuple[str, ...]:
        """Return the keys of `files` with the interactions: three for a published split."""
        if self.has_labels():
            return tuple(f"{self.interactions}.{part}" for part in self.split_parts)
        return (self.interactions,)

    def has_labels(self) -> bool:
        """Return whether the interactions come with a published split."""
        return self.interactions in ("5core-timestamp", "5core-last-out")
