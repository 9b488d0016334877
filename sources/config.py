"""Config of data sets: what each source needs, and what each stage of it reads. Imports nothing heavy."""

import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from sources.pictures_config import Images, PictureLimits
from sources.tables_config import InteractionsFile, ItemsFile
from stages.errors import UserError
from stages.paths import expand
from stages.strict import Float, Strict, nearest, validate

# One line a source. Stages import these by name, so that an edit of one parser reruns its own data sets only.
READERS = {
    "sample": "sources.amazon_2014",
    "files": "sources.files",
    "amazon-2014": "sources.amazon_2014",
}
FINDERS = {
    "none": "sources.pictures_none",
    "folder": "sources.pictures_folder",
    "urls": "sources.pictures_urls",
}

_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _check_url(url: str) -> str:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ValueError("must be an http:// or https:// URL")
    return url


_Url = Annotated[str, AfterValidator(_check_url)]


class Split(Strict):
    """How interactions become train, valid and test."""

    strategy: Literal["random", "leave-one-out", "temporal"] = Field(
        default="random",
        description="random: 8:1:1 per user; leave-one-out: each user's last two in time; "
        "temporal: 8:1:1 by two points in time for everybody",
    )
    seed: int = Field(default=42, ge=0, description="seed of the random choices")


class Dataset(Strict):
    """What all sources share."""

    source: str
    kcore: int = Field(default=5, ge=0, description="keep users and items with at least so many interactions; 0 is off")
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="drop",
        description="interactions whose item is not in the item table: leave them out, keep the item without "
        "text and picture, or stop",
    )
    cold_items: Literal["drop", "keep"] = Field(
        default="drop",
        description="items of the item table that no interaction is left of after the k-core: leave them out, or "
        "keep them, to be recommended by their content alone",
    )
    split: Split = Split()

    def downloads(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the files that the download stage can fetch: path -> its spec {urls, sha256, size}."""
        return {}

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the inputs of the prepare stage by name."""
        raise NotImplementedError

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {
            "source": self.source,
            "kcore": self.kcore,
            "unknown_items": self.unknown_items,
            "cold_items": self.cold_items,
        }

    def split_spec(self) -> dict[str, Any]:
        """Return the spec of the split stage."""
        return self.split.identity()

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        raise NotImplementedError

    def images_runtime(self) -> dict[str, Any]:
        """Return what changes the speed of the images stage only."""
        return {}

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the files that the images stage reads besides items.parquet."""
        return {}

    def image_folder(self) -> str | None:
        """Return the user's own folder of pictures, which the images stage reads too, or None."""
        return None

    def published_vectors(self, name: str) -> str | None:
        """Return the raw file of image vectors that was published with the data, or None."""
        return None

    def modules(self) -> dict[str, list[str]]:
        """Return the modules that a stage imports by name for this source, for the digest of its code."""
        return {"prepare": [READERS[self.source]], "images": [FINDERS[self.images_spec()["find"]]]}


class Sample(Dataset):
    """A made-up shop of any size, whose customers' tastes are known."""

    source: Literal["sample"]
    users: int = Field(default=3000, ge=10, description="customers")
    items: int = Field(default=1000, ge=10, description="products")
    seed: int = Field(default=1, ge=0, description="another seed is another shop")
    interactions_per_user: Float = Field(default=10.5, ge=3, description="mean number of purchases of a customer")
    taste: Float = Field(default=1.0, ge=0, description="how much tastes decide; 0 is chance and popularity alone")
    picture_share: Float = Field(
        default=0.5, ge=0, le=1, description="share of taste that only pictures show; only texts tell the rest"
    )
    popularity: Float = Field(default=0.5, ge=0, description="how much popularity decides")
    cold: Float = Field(default=0.05, ge=0, lt=1, description="share of items that hardly anybody has bought yet")
    without_picture: Float = Field(default=0.03, ge=0, lt=1, description="share of items without picture")
    without_description: Float = Field(default=0.1, ge=0, lt=1, description="share of items without description")
    corrupt_pictures: int = Field(default=5, ge=0, description="number of pictures that are damaged files")
    picture_size: int = Field(default=160, ge=32, le=1024, description="width and height of the pictures in pixels")
    images: PictureLimits = PictureLimits()

    def sample_spec(self) -> dict[str, Any]:
        """Return the spec of the sample stage, which writes the raw files of prepare_inputs and image_inputs."""
        shared = set(Dataset.model_fields) | {"images"}
        return self.model_dump(mode="json", exclude=shared)

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the generated raw files."""
        return {"reviews": f"raw/{name}/reviews.json.gz", "meta": f"raw/{name}/meta.json.gz"}

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": "reviews"}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage: the folder `images` beside the listing of image_inputs."""
        return {"find": "folder", "folder": None, "patterns": ["{item_id}.jpg"], **self.images.identity()}

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the checksums of the drawn pictures."""
        return {"pictures": f"raw/{name}/pictures.sha256"}


class Files(Dataset):
    """A user's own data."""

    source: Literal["files"]
    interactions: InteractionsFile = Field(description="table of who bought, clicked or rated what")
    items: ItemsFile | None = Field(
        default=None, description="table of items; without it, items have neither text nor picture"
    )
    images: Images | None = Field(default=None, description="pictures; without it, items have none")

    @model_validator(mode="after")
    def _pictures_can_be_found(self) -> "Files":
        if self.images is None:
            return self
        named = self.items is not None and self.items.columns.image is not None
        if self.images.folder is None and not named:
            raise ValueError("images needs a folder, or items.columns.image with the column of URLs")
        if self.images.folder is not None and self.images.pattern is None and not named:
            raise ValueError("images.folder needs images.pattern, or items.columns.image with the column of file names")
        if self.images.folder is None and not self.images.hosts:
            raise ValueError("images.hosts must list the hosts that pictures may be fetched from")
        return self

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the user's own files."""
        inputs = {"interactions": expand(self.interactions.path)}
        if self.items is not None:
            inputs["items"] = expand(self.items.path)
        return inputs

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage; paths are its inputs and not part of it."""
        tables = {"interactions": self.interactions, "items": self.items}
        return {
            **super().prepare_spec(),
            **{
                name: table and {"format": table.resolved_format, "columns": table.columns.identity()}
                for name, table in tables.items()
            },
        }

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        return self.images.spec() if self.images else {"find": "none"}

    def image_folder(self) -> str | None:
        """Return the local folder of pictures, if that is where they are."""
        return expand(self.images.folder) if self.images and self.images.folder else None

    def images_runtime(self) -> dict[str, Any]:
        """Return what changes the speed of the images stage only."""
        return self.images.runtime() if self.images and self.images.folder is None else {}


class Expected(Strict):
    """Published counts; others are an error."""

    users: int | None = Field(default=None, ge=1, description="users after the k-core")
    items: int | None = Field(default=None, ge=1, description="items after the k-core")
    interactions: int | None = Field(default=None, ge=1, description="interactions after the k-core")


_AMAZON_2014 = (
    "https://snap.stanford.edu/data/amazon/productGraph",
    "http://snap.stanford.edu/data/amazon/productGraph",
)
_AMAZON_IMAGE_HOSTS = (
    "ecx.images-amazon.com",
    "g-ecx.images-amazon.com",
    "images.amazon.com",
    "images-na.ssl-images-amazon.com",
    "m.media-amazon.com",
)


class Amazon2014(Dataset):
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
    mirrors: list[_Url] = Field(
        default=list(_AMAZON_2014), min_length=1, description="roots of the 2014 tree, tried in order"
    )
    sha256: dict[str, _Hex] = Field(default={}, description="checksums by file name, such as ratings_Baby.csv")
    expected: Expected = Expected()
    images: Images = Field(
        default=Images(), description="a local folder of pictures by item id, or nothing: fetched from Amazon's hosts"
    )

    @model_validator(mode="after")
    def _local_pictures_have_a_pattern(self) -> "Amazon2014":
        if self.images.folder is not None and self.images.pattern is None:
            raise ValueError("images.folder needs images.pattern, such as {item_id}.jpg")
        return self

    @model_validator(mode="after")
    def _checksums_of_own_files(self) -> "Amazon2014":
        for file in self.sha256:
            if file not in self._files().values():
                raise ValueError(
                    f"sha256 names {file!r}, which is no file of it{nearest(file, self._files().values())}"
                )
        return self

    def _files(self) -> dict[str, str]:
        return {
            "ratings": f"ratings_{self.category}.csv",
            "reviews": f"reviews_{self.category}_5.json.gz",
            "meta": f"meta_{self.category}.json.gz",
            "image_features": f"image_features_{self.category}.b",
        }

    def downloads(self, name: str) -> dict[str, dict[str, Any]]:
        """Return all files of the category, also the published image features, which only some experiments ask for."""
        return {
            f"raw/{name}/{file}": {
                "urls": [
                    f"{root.rstrip('/')}/{'image_features/' if kind == 'image_features' else ''}categoryFiles/{file}"
                    for root in self.mirrors
                ],
                "sha256": self.sha256.get(file),
                "size": None,
            }
            for kind, file in self._files().items()
        }

    def published_vectors(self, name: str) -> str | None:
        """Return the raw file of the 4096-d image vectors."""
        return f"raw/{name}/{self._files()['image_features']}"

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the downloaded files."""
        files = self._files()
        return {"reviews": f"raw/{name}/{files[self.interactions]}", "meta": f"raw/{name}/{files['meta']}"}

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {**super().prepare_spec(), "interactions": self.interactions, "expected": self.expected.identity()}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        spec = self.images.spec()
        return spec if spec["find"] != "urls" or spec["hosts"] else {**spec, "hosts": sorted(_AMAZON_IMAGE_HOSTS)}

    def image_folder(self) -> str | None:
        """Return the local folder of pictures, if that is where they are."""
        return expand(self.images.folder) if self.images.folder else None

    def images_runtime(self) -> dict[str, Any]:
        """Return what changes the speed of the images stage only."""
        return self.images.runtime() if self.images.folder is None else {}


SOURCES: dict[str, type[Dataset]] = {
    get_args(model.model_fields["source"].annotation)[0]: model for model in (Sample, Files, Amazon2014)
}


def parse_dataset(name: str, data: Any, where: str) -> Dataset:
    """Return a data set's config, checked.

    Args:
        name: the data set's name, a key under `datasets`; it becomes a folder name.
        data: the mapping that YAML gave.
        where: its key path for messages, such as datasets.baby.

    Raises:
        UserError: one line per fault, with the key's path, the value and the nearest valid name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"{where}: the name {name!r} becomes a folder; use letters, digits, _ and - only")
    if not isinstance(data, dict):
        raise UserError(f"{where} = {data!r}: must be a mapping with a source, one of {', '.join(SOURCES)}")
    source = data.get("source")
    if source is None:
        raise UserError(f"{where}.source: required, but not given; one of {', '.join(SOURCES)}")
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"{where}.source = {source!r}: there is no such source{nearest(source, SOURCES)}")
    return validate(SOURCES[source], data, where)
