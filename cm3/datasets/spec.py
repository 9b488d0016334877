"""Base of every dataset source: its settings, the specs of the stages that process it, and the files that they read."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cm3.common.parts import Part, digest_of_modules
from cm3.common.paths import expand
from cm3.common.strict import Strict
from cm3.datasets.images.config import Images

if TYPE_CHECKING:
    from cm3.datasets.reader import Reader

CHECKS = frozenset({"expected", "malformed", "checksums"})
"""Fields of the prepare stage's spec that only raise errors and do not change the tables."""

Strategy = Literal["random", "user-time", "global-time", "leave-one-out", "published"]

_HELD = re.compile(r"\.(csv|tsv|inter|txt)(\.gz)?$")
_MEGABYTE = 1e6


class Split(Strict):
    """Assignment of interactions to train, valid and test."""

    strategy: Strategy | None = Field(
        default=None,
        description="random (default): 8:1:1 of each user; user-time: 8:1:1 of each user in time order; global-time: "
        "8:1:1 by two points in time for all users; leave-one-out: the last two of each user in time; published: the "
        "labels in the data (default where there are labels)",
    )
    seed: int = Field(default=42, ge=0, description="Seed of random choices.")
    keep: str | None = Field(
        default=None,
        description="Folder with interactions.parquet, items.parquet and users.parquet of an earlier split. Its training "
        "interactions never become validation or test; random splits keep all of its labels (docs/growing-data.md).",
    )


class Expected(Strict):
    """Published counts after k-core filtering; other counts are an error."""

    users: int | None = Field(default=None, ge=1, description="Number of users.")
    items: int | None = Field(default=None, ge=1, description="Number of items.")
    interactions: int | None = Field(default=None, ge=1, description="Number of interactions.")


class SourceSpec(Strict, Part):
    """Settings that every source has. A source is a subclass that `cm3.datasets.registry` lists.

    Attributes:
        reader: module:class of its `cm3.datasets.reader.Reader`, imported by the prepare stage only.
        review_reader: module:function that reads the texts of reviews for the reviews stage; empty for sources without.
        user_reader: module:function that reads a users' table for the user-groups stage; empty for sources without.
        labelled: the data come with a published split.
        own: the data are the user's own, not those of a publication, in whose way they are split by default.
    """

    reader: ClassVar[str]
    review_reader: ClassVar[str] = ""
    user_reader: ClassVar[str] = ""
    labelled: ClassVar[bool] = False
    own: ClassVar[bool] = False

    source: str
    kcore: int | None = Field(
        default=None,
        ge=0,
        description="k-core filtering: keep users and items with at least this many interactions; 0 is off. Default: 5, "
        "or 0 for data with a published split.",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="drop",
        description="Interactions with items that are not in the item table: drop, keep (items without text and image) or "
        "error. amazon, microlens and mmrec keep them by default, as their published counts do.",
    )
    cold_items: Literal["drop", "keep"] = Field(
        default="drop",
        description="Items without interactions after k-core filtering: drop, or keep as cold items (recommended from "
        "content only).",
    )
    expected: Expected = Expected()
    split: Split = Split()

    @model_validator(mode="after")
    def _labels_exist(self) -> "SourceSpec":
        if self.split.strategy == "published" and not self.has_labels():
            raise ValueError("split.strategy published: the data have no published split; choose another strategy")
        if self.split.keep and self.split_spec()["strategy"] in ("published", "global-time"):
            raise ValueError(
                f"split.keep: strategy {self.split_spec()['strategy']} does not keep labels; remove split.keep"
            )
        return self

    @classmethod
    def open_reader(cls, spec: dict[str, Any], inputs: dict[str, Path]) -> "Reader":
        """Return a reader of raw files.

        Args:
            spec: a prepare_spec().
            inputs: the files of prepare_inputs() by name.
        """
        module, _, name = cls.reader.partition(":")
        reader: Reader = getattr(importlib.import_module(module), name)(spec, inputs)
        return reader

    @classmethod
    def code_version(cls) -> str:
        """Return the version as text, or a digest of the modules of spec and reader where it has none."""
        if cls.version is not None:
            return str(cls.version)
        return "dev-" + digest_of_modules(cls.__module__, cls.reader.partition(":")[0], *cls.code_modules)

    @classmethod
    def published_files(cls, inputs: Mapping[str, Path]) -> dict[str, bool]:
        """Return whether files next to the inputs of the prepare stage are the published ones, for files that are known.

        Args:
            inputs: the files of prepare_inputs() by name.
        """
        return {}

    def has_labels(self) -> bool:
        """Return whether the data come with a published split."""
        return self.labelled

    def downloads(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the files that the download stage can fetch: path -> its spec {urls, path, sha256, size}."""
        return {}

    def generate_spec(self) -> dict[str, Any] | None:
        """Return the spec of the generate stage, which writes the raw files; None for data that are not generated."""
        return None

    def expected_counts(self) -> dict[str, int]:
        """Return the numbers of users, items and interactions that the settings state, for estimates."""
        return {name: count for name, count in self.expected.identity().items() if count is not None}

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the input files of the prepare stage by name."""
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
        """Return the fields of `prepare_spec` that change the tables."""
        return {name: value for name, value in self.prepare_spec().items() if name not in CHECKS}

    def prepare_estimate(self, files: Mapping[str, str]) -> tuple[float, float]:
        """Return memory in MB (10^6 bytes) and minutes that the prepare stage needs, from the sizes of its inputs.

        Reviews and metadata are streamed; the tables of `held_in_memory` are not, compressed or not.

        Args:
            files: its inputs by name; a file that does not exist yet counts as empty.
        """
        held = [path for path in files.values() if self.held_in_memory(path)]
        streamed = set(files.values()) - set(held)
        held_mb, streamed_mb = _megabytes(*held), _megabytes(*streamed)
        return 1500 + 6 * held_mb + streamed_mb, 15 + (held_mb + streamed_mb) / 300

    def held_in_memory(self, path: str) -> bool:
        """Return whether the prepare stage holds a file's contents in memory at once."""
        return _HELD.search(path) is not None

    def split_spec(self) -> dict[str, Any]:
        """Return the spec of the split stage."""
        default = "published" if self.has_labels() else "random"
        return self.split.identity() | {"strategy": self.split.strategy or default}

    def split_runtime(self) -> dict[str, Any]:
        """Return the settings of the split stage that change its messages only."""
        return {"warn_of_random": self.own and self.split.strategy is None}

    def review_inputs(self, name: str) -> dict[str, str]:
        """Return the files with the texts of reviews by name; empty for data without reviews."""
        return {}

    def reviews_spec(self) -> dict[str, Any]:
        """Return the spec of the reviews stage."""
        return {"source": self.source}

    def user_groups_inputs(self, name: str) -> dict[str, str]:
        """Return the files of the users' table by name; empty for data without one."""
        return {}

    def user_groups_spec(self) -> dict[str, Any]:
        """Return the spec of the user-groups stage; `columns.groups` names the columns that users are compared by."""
        return {"source": self.source}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage; `find` names one of the registry's image sources."""
        return {"find": "none"}

    def images_runtime(self) -> dict[str, Any]:
        """Return the settings of the images stage that change its speed only."""
        return {}

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the input files of the images stage by name, without items.parquet."""
        return {}

    def image_folder(self) -> str | None:
        """Return the user's own image folder, whose contents the images stage reads, or None."""
        return None

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return the files with published vectors of a modality: `vectors`, and `ids` if the ids are in a file apart."""
        return {}


class SourceWithImages(SourceSpec):
    """Settings of sources whose images are in a local folder or are downloaded."""

    images: Images | None = None

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        return self.images.spec() if self.images else super().images_spec()

    def image_folder(self) -> str | None:
        """Return the local image folder, if there is one."""
        return expand(self.images.folder) if self.images and self.images.folder else None

    def images_runtime(self) -> dict[str, Any]:
        """Return the settings of the images stage that change its speed only."""
        return self.images.runtime() if self.images and self.images.folder is None else {}


def check_group_names(names: list[str]) -> list[str]:
    """Return the names of columns that users are compared by.

    Raises:
        ValueError: a duplicate, "user", or a column whose gap would have the name of what is chance for another.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"duplicate column {twice!r}")
    if "user" in names or "" in names:
        raise ValueError(f"{'user' if 'user' in names else ''!r} cannot be the name of a group; rename the column")
    for name in names:
        if f"{name}_chance" in names:
            raise ValueError(
                f"{name!r} and '{name}_chance': recall_gap_{name}_chance would be the name of two numbers; rename the second "
                "column"
            )
    return names


def _megabytes(*paths: str) -> float:
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file()) / _MEGABYTE
