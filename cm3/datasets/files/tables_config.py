"""Settings of the user's own tables: path, format and column names."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.paths import expand
from cm3.common.strict import Strict
from cm3.datasets.images.config import Names

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


class ItemColumns(Strict):
    """Column names of an item table; the columns of a list are joined in order."""

    item_id: str = Field(default="item_id", min_length=1, description="Item id, as in the interactions.")
    title: Names | None = Field(default=None, description="Title.")
    brand: Names | None = Field(default=None, description="Brand.")
    categories: Names | None = Field(default=None, description="Categories: one per column, or lists.")
    description: Names | None = Field(default=None, description="Description.")
    features: Names | None = Field(default=None, description="Selling points: one per column, or lists.")
    image: Names | None = Field(default=None, description="Path in images.folder, or URLs.")


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
        if not self.resolved_format:
            raise ValueError(
                f"unknown suffix in {self.path!r}, and no folder; set format to csv, tsv, jsonl or parquet"
            )
        return self


class InteractionsFile(TableFile):
    """The user's interactions."""

    columns: InteractionColumns = InteractionColumns()


class ItemsFile(TableFile):
    """The user's items."""

    columns: ItemColumns = ItemColumns()
