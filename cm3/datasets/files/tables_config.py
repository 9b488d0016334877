"""Config of a user's own tables: where they are, in which format, and which column is what."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

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

    user: str = Field(default="user", min_length=1, description="user id")
    item: str = Field(default="item", min_length=1, description="item id")
    rating: str | None = Field(default=None, description="a number; left out where purchases or clicks have none")
    timestamp: str | None = Field(default=None, description="Unix seconds, Unix milliseconds, or dates like 2020-09-16")


class ItemColumns(Strict):
    """Column names of an item table; a list of columns is joined in its order."""

    item_id: str = Field(default="item_id", min_length=1, description="id, the same as in the interactions")
    title: Names | None = Field(default=None, description="title")
    brand: Names | None = Field(default=None, description="brand")
    categories: Names | None = Field(default=None, description="one category a column, or lists of them")
    description: Names | None = Field(default=None, description="description")
    features: Names | None = Field(default=None, description="selling points, one a column, or lists of them")
    image: Names | None = Field(default=None, description="path in images.folder, or URLs")


class TableFile(Strict):
    """A table in a file."""

    path: str = Field(min_length=1, description="relative to the working directory or absolute; ~ and $VARIABLES work")
    format: _Format = Field(
        default="auto", description="auto goes by the suffix: csv, tsv, jsonl, parquet; .gz may follow"
    )

    @cached_property
    def resolved_format(self) -> str:
        """The format, told by the suffix where it is auto."""
        if self.format != "auto":
            return self.format
        suffixes = [s.lower() for s in Path(self.path).suffixes]
        return _SUFFIXES.get(next((s for s in reversed(suffixes) if s != ".gz"), ""), "")

    @model_validator(mode="after")
    def _known_format(self) -> "TableFile":
        if not self.resolved_format:
            raise ValueError(
                f"no format is known by the suffix of {self.path!r}; set format to csv, tsv, jsonl or parquet"
            )
        return self


class InteractionsFile(TableFile):
    """The user's interactions."""

    columns: InteractionColumns = InteractionColumns()


class ItemsFile(TableFile):
    """The user's items."""

    columns: ItemColumns = ItemColumns()
