"""Settings of a folder with atomic files of RecBole: {name}.inter, {name}.item, or {name}.train.inter and so on."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from cm3.common.input_files import contents_of
from cm3.common.paths import expand
from cm3.common.strict import Float, Strict
from cm3.common.tables import SPLITS
from cm3.datasets.images.config import Images, Names
from cm3.datasets.spec import SourceWithImages, check_group_names


class AtomicColumns(Strict):
    """Column names of the .inter file, without their types; upper and lower case are the same."""

    user: str | None = Field(default=None, min_length=1, description="User id; default: user_id or user.")
    item: str | None = Field(
        default=None, min_length=1, description="Item id, also in the .item file; default: item_id or item."
    )
    rating: str | None = Field(default=None, min_length=1, description="Rating; default: rating, if there is one.")
    timestamp: str | None = Field(default=None, min_length=1, description="Time; default: timestamp, if there is one.")


class AtomicItemColumns(Strict):
    """Column names of the .item file, without their types; the columns of a list are joined in order."""

    title: Names | None = Field(default=None, description="Title; default: title, item_name, movie_title or name.")
    brand: Names | None = Field(default=None, description="Brand; default: brand.")
    categories: Names | None = Field(
        default=None, description="Categories; default: categories, category, class, genres or genre."
    )
    description: Names | None = Field(default=None, description="Description; default: description.")
    features: Names | None = Field(default=None, description="Selling points; default: features or feature.")
    image: Names | None = Field(
        default=None, description="Path in images.folder, or URLs; default: image, image_url or imurl."
    )


class RecBoleSpec(SourceWithImages):
    """A dataset folder of RecBole: atomic files, whose header names the columns and their types."""

    version = 1
    libraries = ("pyarrow",)
    reader = "cm3.datasets.recbole.reader:Reader"
    user_reader = "cm3.datasets.recbole.user_table:read_users"
    own = True

    source: Literal["recbole"]
    folder: str = Field(
        min_length=1, description="The dataset's folder, such as dataset/ml-100k; ~ and $VARIABLES are expanded."
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[^/\\]+$",
        description="Name of the files without .inter and .item; default: the folder's name.",
    )
    benchmark: list[str] | None = Field(
        default=None,
        min_length=3,
        max_length=3,
        description="RecBole's benchmark_filename: names of the parts of a published split. Default: [train, valid, test] "
        "if there are {name}.train.inter, {name}.valid.inter and {name}.test.inter, and no {name}.inter.",
    )
    field_separator: str = Field(
        default="\t", min_length=1, max_length=1, description="Character between two values; default: a tab."
    )
    seq_separator: str = Field(
        default=" ", min_length=1, description="Characters between two values of a sequence, such as categories."
    )
    malformed: Float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest accepted fraction of lines with more or fewer values than the header; they are skipped and "
        "counted in stats.json.",
    )
    columns: AtomicColumns = Field(default=AtomicColumns(), description="Columns of the .inter file.")
    items: AtomicItemColumns = Field(default=AtomicItemColumns(), description="Columns of the .item file.")
    user_groups: Names | None = Field(
        default=None,
        min_length=1,
        description="Columns of the .user file to compare users by, without their types, such as [age, gender]; read for "
        "studies only, and a change of it trains nothing.",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep", description="As for every dataset. Default keep: RecBole needs no row in the .item file either."
    )
    images: Images | None = Field(
        default=None, description="A local folder of images, or the hosts of the URLs in the .item file."
    )

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "RecBoleSpec":
        if self.images is not None and self.images.folder is None and not self.images.hosts:
            raise ValueError("images needs a folder, or hosts that images may be downloaded from")
        return self

    @field_validator("user_groups")
    @classmethod
    def _can_be_columns(cls, value: list[str] | None) -> list[str] | None:
        return value and check_group_names(value)

    @property
    def _place(self) -> Path:
        return Path(expand(self.folder))

    def _file(self, *suffixes: str) -> Path:
        place = self._place
        stem = self.name or (place.name if place.name not in ("", "..") else place.resolve().name)
        return place / ".".join([stem, *suffixes])

    def _parts(self) -> dict[str, Path]:
        """Return the files of a published split by label; empty for a dataset without one."""
        chosen = self.benchmark or list(SPLITS)
        parts = {label: self._file(part, "inter") for label, part in zip(SPLITS, chosen, strict=True)}
        found = all(path.is_file() for path in parts.values()) and not self._file("inter").is_file()
        return parts if self.benchmark or found else {}

    def has_labels(self) -> bool:
        """Return whether the dataset has a file for each part of a split."""
        return bool(self._parts())

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the .inter file or those of the parts, and the .item file where it exists.

        Raises:
            UserError: the folder does not exist or has no interactions.
        """
        if not self._place.is_dir():
            raise UserError(f"{self._place}: no such folder; set the dataset's folder to the one with RecBole's files")
        inputs = self._parts() or {"interactions": self._file("inter")}
        for path in inputs.values():
            if not path.is_file():
                found = ", ".join(sorted(other.name for other in self._place.glob("*.inter")))
                hint = f"; set name or benchmark, the folder has {found}" if found else f"; {contents_of(self._place)}"
                raise UserError(f"{self._place}: has no {path.name}{hint}")
        items = self._file("item")
        return {kind: str(path) for kind, path in inputs.items()} | ({"items": str(items)} if items.is_file() else {})

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage; it does not include the paths of its inputs."""
        return {
            **super().prepare_spec(),
            "malformed": self.malformed,
            "field_separator": self.field_separator,
            "seq_separator": self.seq_separator,
            "columns": self.columns.identity(),
            "items": self.items.identity(),
        }

    def user_groups_inputs(self, name: str) -> dict[str, str]:
        """Return the .user file, if some of its columns are named."""
        return {"user_table": str(self._file("user"))} if self.user_groups else {}

    def user_groups_spec(self) -> dict[str, Any]:
        """Return the spec of the user-groups stage."""
        columns = {"user": self.columns.user, "groups": self.user_groups}
        return {
            **super().user_groups_spec(),
            "malformed": self.malformed,
            "field_separator": self.field_separator,
            "columns": columns,
        }

    def held_in_memory(self, path: str) -> bool:
        """Return True: the tables are held in memory while they are parsed."""
        return True
