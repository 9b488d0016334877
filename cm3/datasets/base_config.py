"""Config that all sources of data share: what each stage is told, and which files it reads."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cm3.common.paths import expand
from cm3.common.strict import Strict
from cm3.datasets.images.config import Images

CHECKS = frozenset({"expected", "malformed", "checksums"})
"""What of the prepare stage's spec raises errors and decides nothing of the tables."""

Strategy = Literal["random", "user-time", "global-time", "leave-one-out", "published"]


class Split(Strict):
    """How interactions become train, valid and test."""

    strategy: Strategy | None = Field(
        default=None,
        description="random: 8:1:1 of each user, the default; user-time: 8:1:1 of each user in time order; global-time: "
        "8:1:1 by two points in time for everybody; leave-one-out: each user's last two in time; published: the labels "
        "that come with the data, the default where there are some",
    )
    seed: int = Field(default=42, ge=0, description="seed of the random choices")
    keep: str | None = Field(
        default=None,
        description="folder with interactions.parquet, items.parquet and users.parquet of an earlier preparation: what it "
        "has in training is never asked for in validation or test, and random splits keep all of its labels "
        "(docs/growing-data.md)",
    )


class Expected(Strict):
    """Published counts after the k-core; others are an error."""

    users: int | None = Field(default=None, ge=1, description="users")
    items: int | None = Field(default=None, ge=1, description="items")
    interactions: int | None = Field(default=None, ge=1, description="interactions")


class Dataset(Strict):
    """What all sources share."""

    labelled: ClassVar[bool] = False
    """Whether the data come with a split of their own."""

    source: str
    kcore: int | None = Field(
        default=None,
        ge=0,
        description="keep users and items with at least so many interactions; 0 is off; by default 5, and 0 for data that "
        "come with a split of their own",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="drop",
        description="interactions whose item is not in the item table: leave them out, keep the item without "
        "text and image, or stop; amazon, microlens and mmrec keep them by default, as their published counts do",
    )
    cold_items: Literal["drop", "keep"] = Field(
        default="drop",
        description="items of the item table that no interaction is left of after the k-core: leave them out, or "
        "keep them, to be recommended by their content alone",
    )
    expected: Expected = Expected()
    split: Split = Split()

    @model_validator(mode="after")
    def _labels_exist(self) -> "Dataset":
        if self.split.strategy == "published" and not self.has_labels():
            raise ValueError("split.strategy published: these data come without labels; choose another strategy")
        if self.split.keep and self.split_spec()["strategy"] in ("published", "global-time"):
            raise ValueError(f"split.keep: strategy {self.split_spec()['strategy']} does not keep labels; leave it out")
        return self

    def has_labels(self) -> bool:
        """Whether the data come with a split of their own."""
        return self.labelled

    def downloads(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the files that the download stage can fetch: path -> its spec {urls, path, sha256, size}."""
        return {}

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the inputs of the prepare stage by name."""
        raise NotImplementedError

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        return {
            "source": self.source,
            "kcore": self.kcore if self.kcore is not None else 0 if self.has_labels() else 5,
            "unknown_items": self.unknown_items,
            "cold_items": self.cold_items,
            "expected": self.expected.identity(),
        }

    def tables_spec(self) -> dict[str, Any]:
        """Return what of `prepare_spec` decides the tables."""
        return {name: value for name, value in self.prepare_spec().items() if name not in CHECKS}

    def split_spec(self) -> dict[str, Any]:
        """Return the spec of the split stage."""
        default = "published" if self.has_labels() else "random"
        return self.split.identity() | {"strategy": self.split.strategy or default}

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
        """Return the user's own folder of images, which the images stage reads too, or None."""
        return None

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return the files of the vectors that were published with the data by name: vectors, and ids where apart."""
        return {}


class WithImages(Dataset):
    """What sources share whose images lie in a local folder or are fetched."""

    images: Images | None = None

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        return self.images.spec() if self.images else {"find": "none"}

    def image_folder(self) -> str | None:
        """Return the local folder of images, if that is where they are."""
        return expand(self.images.folder) if self.images and self.images.folder else None

    def images_runtime(self) -> dict[str, Any]:
        """Return what changes the speed of the images stage only."""
        return self.images.runtime() if self.images and self.images.folder is None else {}
