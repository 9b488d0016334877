"""Settings of the user's own tables."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cm3.common.input_files import named_parts
from cm3.common.paths import expand
from cm3.datasets.files.tables_config import InteractionsFile, ItemsFile, UsersFile
from cm3.datasets.images.config import Images
from cm3.datasets.spec import SourceWithImages


class FilesImages(Images):
    """Source of product images: a local folder, the URLs in the item table, or the item table itself."""

    embedded: bool = Field(
        default=False,
        description="the image column of a Parquet item table holds the images: bytes, or structs {bytes, path} as "
        "Hugging Face's datasets have them",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "FilesImages":
        if self.embedded and (self.folder is not None or self.hosts):
            raise ValueError("embedded images need neither folder nor hosts; remove them, or embedded")
        return self


class FilesSpec(SourceWithImages):
    """The user's own tables and images."""

    version = 1
    reader = "cm3.datasets.files.reader:Reader"
    review_reader = "cm3.datasets.files.review_texts:read_texts"
    user_reader = "cm3.datasets.files.user_table:read_users"
    own = True

    source: Literal["files"]
    interactions: InteractionsFile = Field(
        description="Table of interactions: users and the items that they bought, clicked or rated."
    )
    items: ItemsFile | None = Field(
        default=None, description="Table of items; without it, items have neither text nor image."
    )
    users: UsersFile | None = Field(
        default=None,
        description="Table of users with columns to compare them by, such as age or country; read for studies only, and a "
        "change of it trains nothing.",
    )
    images: FilesImages | None = Field(default=None, description="Product images; without it, items have none.")

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "FilesSpec":
        if self.images is None:
            return self
        named = self.items is not None and self.items.columns.image is not None
        if self.images.embedded:
            if self.items is None or not named or self.items.resolved_format != "parquet":
                raise ValueError("images.embedded needs a Parquet table of items, and its items.columns.image")
            return self
        if self.images.folder is None and not named:
            raise ValueError("images needs a folder, or items.columns.image with the column of URLs")
        if self.images.folder is not None and self.images.pattern is None and not named:
            raise ValueError("images.folder needs images.pattern, or items.columns.image with the column of file names")
        if self.images.folder is None and not self.images.hosts:
            raise ValueError("images.hosts must list the hosts that images may be downloaded from")
        return self

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the user's own files; each part of a table in a folder is one."""
        tables = {"interactions": self.interactions, "items": self.items}
        inputs: dict[str, str] = {}
        for kind, table in tables.items():
            if table is not None:
                inputs |= named_parts(kind, Path(expand(table.path)))
        return inputs

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage; it does not include the paths of its inputs."""
        spec: dict[str, Any] = super().prepare_spec()
        for name, table in (("interactions", self.interactions), ("items", self.items)):
            spec[name] = table and _entry(table)
        del spec["interactions"]["columns"]["review"]  # The reviews stage reads it.
        spec["interactions"] |= self.interactions.rows()
        if self._embedded:
            spec["items"]["columns"]["image"] = None  # The images stage reads it.
        return spec

    def has_labels(self) -> bool:
        """Return whether the interactions have a column with their split."""
        return self.interactions.columns.split is not None

    def review_inputs(self, name: str) -> dict[str, str]:
        """Return the table of interactions, if it has a column of reviews."""
        named = self.interactions.columns.review is not None
        return named_parts("interactions", Path(expand(self.interactions.path))) if named else {}

    def reviews_spec(self) -> dict[str, Any]:
        """Return the spec of the reviews stage."""
        return {**super().reviews_spec(), **_entry(self.interactions), **self.interactions.rows()}

    def user_groups_inputs(self, name: str) -> dict[str, str]:
        """Return the users' table; each part of one in a folder is an input."""
        return named_parts("user_table", Path(expand(self.users.path))) if self.users else {}

    def user_groups_spec(self) -> dict[str, Any]:
        """Return the spec of the user-groups stage."""
        return {**super().user_groups_spec(), **(_entry(self.users) if self.users else {})}

    @property
    def _embedded(self) -> bool:
        return self.images is not None and self.images.embedded

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        if not self._embedded or self.images is None or self.items is None:
            return super().images_spec()
        columns = self.items.columns
        return self.images.limits() | {"find": "embedded", "item_id": columns.item_id, "columns": columns.image}

    def images_runtime(self) -> dict[str, Any]:
        """Return the settings of the images stage that change its speed only."""
        return {} if self._embedded else super().images_runtime()

    def image_inputs(self, name: str) -> dict[str, str]:
        """Return the item table, if it holds the images."""
        return named_parts("table", Path(expand(self.items.path))) if self._embedded and self.items else {}

    def held_in_memory(self, path: str) -> bool:
        """Return True: all formats are held in memory while they are parsed."""
        return True


def _entry(table: InteractionsFile | ItemsFile | UsersFile) -> dict[str, Any]:
    """Return the part of a spec that says how a table is written and what its columns are."""
    return {"format": table.resolved_format, "columns": table.columns.identity(), **table.layout()}
