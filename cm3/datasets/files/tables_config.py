"""Settings of the user's own tables: path, format and column names."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from cm3.common.paths import expand
from cm3.common.strict import Float, Strict
from cm3.datasets.images.config import Names
from cm3.datasets.spec import check_group_names

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".inter": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_OTHER_SUFFIXES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save the sheet as CSV and name that file"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z"), "compressed; unpack it, or compress it with gzip"),
    **dict.fromkeys(
        (".feather", ".arrow", ".pkl", ".pickle", ".h5", ".orc", ".avro"), "not read; save the table as Parquet"
    ),
}
_Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]


class InteractionColumns(Strict):
    """Column names of an interactions table."""

    user: str = Field(default="user", min_length=1, description="User id.")
    item: str = Field(default="item", min_length=1, description="Item id.")
    rating: str | None = Field(default=None, description="Rating, a number; leave it out for purchases or clicks.")
    timestamp: str | None = Field(
        default=None, description="Time in Unix seconds, Unix milliseconds, or dates like 2020-09-16."
    )
    review: str | None = Field(
        default=None, description="Text of the user's review, read only for extractors of modality reviews."
    )
    split: str | None = Field(
        default=None,
        description="Split of your own: train, valid (validation, val, dev) or test in every row; then k-core filtering is "
        "off by default.",
    )
    event: str | None = Field(default=None, description="Kind of interaction, such as view or purchase; see events.")

    def identity(self) -> dict[str, Any]:
        """Return the columns, split and event only where they are set: other keys were computed without them."""
        found = super().identity()
        return {name: column for name, column in found.items() if column or name not in ("split", "event")}


class ItemColumns(Strict):
    """Column names of an item table; the columns of a list are joined in order."""

    item_id: str = Field(default="item_id", min_length=1, description="Item id, as in the interactions.")
    title: Names | None = Field(default=None, description="Title.")
    brand: Names | None = Field(default=None, description="Brand.")
    categories: Names | None = Field(default=None, description="Categories: one per column, or lists.")
    description: Names | None = Field(default=None, description="Description.")
    features: Names | None = Field(default=None, description="Selling points: one per column, or lists.")
    image: Names | None = Field(default=None, description="Path in images.folder, or URLs.")


class UserColumns(Strict):
    """Column names of a users' table; no other column is read."""

    user_id: str = Field(default="user_id", min_length=1, description="User id, as in the interactions.")
    groups: Names = Field(
        min_length=1,
        description="Columns to compare users by, such as [age, country]: numbers, or text with few different values.",
    )

    @field_validator("groups")
    @classmethod
    def _can_be_columns(cls, value: list[str]) -> list[str]:
        return check_group_names(value)

    @model_validator(mode="after")
    def _id_is_no_group(self) -> "UserColumns":
        if self.user_id in self.groups:
            raise ValueError(
                f"groups: {self.user_id!r} is the column of the ids; name columns that several users share"
            )
        return self


class TableFile(Strict):
    """A table in a file, or in a folder of Parquet parts."""

    path: str = Field(
        min_length=1,
        description="Path, absolute or relative to the working directory; ~ and $VARIABLES are expanded. Of Parquet, also "
        "a folder with parts.",
    )
    format: _Format = Field(
        default="auto",
        description="File format; auto: by the suffix .csv, .tsv, .jsonl or .parquet, .gz may follow; a folder is Parquet.",
    )

    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="character between the cells of a csv or tsv file, such as ';'; null: a comma in csv, a tab in tsv",
    )
    encoding: Literal["utf-8", "cp1252", "latin-1", "utf-16"] = Field(
        default="utf-8", description="encoding of the text of a csv or tsv file; cp1252 is that of Windows in the West"
    )
    header: list[str] | None = Field(
        default=None,
        min_length=1,
        description="names of the columns, in order, of a csv or tsv file whose first line already holds values",
    )

    def layout(self) -> dict[str, Any]:
        """Return delimiter, encoding and header where they are set: the keys of other tables do not hold them."""
        found = {"delimiter": self.delimiter, "encoding": self.encoding, "header": self.header}
        return {name: value for name, value in found.items() if value not in (None, "utf-8")}

    @model_validator(mode="after")
    def _only_text_has_a_layout(self) -> "TableFile":
        if self.layout() and self.resolved_format not in ("csv", "tsv"):
            name = next(iter(self.layout()))
            raise ValueError(f"{name} is for csv and tsv only; remove it, or set format: csv")
        return self

    @cached_property
    def resolved_format(self) -> str:
        """The format; `auto` is resolved by the suffix."""
        if self.format != "auto":
            return self.format
        suffixes = [s.lower() for s in Path(self.path).suffixes]
        by_suffix = _SUFFIXES.get(next((s for s in reversed(suffixes) if s != ".gz"), ""), "")
        return by_suffix or ("parquet" if self._is_folder() else "")

    def _is_folder(self) -> bool:
        try:
            return Path(expand(self.path)).is_dir()
        except UserError:  # a variable that is not set
            return False

    @model_validator(mode="after")
    def _known_format(self) -> "TableFile":
        suffix = Path(self.path).suffix.lower()
        if self.format == "auto" and suffix in _OTHER_SUFFIXES and not self._is_folder():
            raise ValueError(f"{self.path!r} is {_OTHER_SUFFIXES[suffix]}")
        if not self.resolved_format:
            raise ValueError(
                f"unknown suffix in {self.path!r}, and no folder; set format to csv, tsv, jsonl or parquet"
            )
        return self


class InteractionsFile(TableFile):
    """The user's interactions."""

    columns: InteractionColumns = InteractionColumns()
    decimal: Literal[".", ","] = Field(default=".", description="decimal mark of the ratings, such as ',' in 4,5")
    min_rating: Float | None = Field(default=None, description="leave out interactions with a lower rating")
    events: list[str] | None = Field(
        default=None, min_length=1, description="keep interactions of these kinds only, by columns.event"
    )

    def rows(self) -> dict[str, Any]:
        """Return the settings that decide how rows are read and which are kept, where they are set."""
        found: dict[str, Any] = {
            "decimal": None if self.decimal == "." else self.decimal,
            "min_rating": self.min_rating,
        }
        found |= {"events": sorted(set(self.events)) if self.events else None}
        return {name: value for name, value in found.items() if value is not None}

    @model_validator(mode="after")
    def _columns_of_filters(self) -> "InteractionsFile":
        if self.min_rating is not None and self.columns.rating is None:
            raise ValueError("min_rating needs columns.rating, the column of the ratings")
        if (self.events is None) != (self.columns.event is None):
            raise ValueError("events, the kinds to keep, and columns.event, the column of the kinds, need each other")
        return self


class ItemsFile(TableFile):
    """The user's items."""

    columns: ItemColumns = ItemColumns()


class UsersFile(TableFile):
    """Table of users with columns to compare them by; read for studies only, never for training."""

    columns: UserColumns
