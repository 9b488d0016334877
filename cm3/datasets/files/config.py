"""Config of a user's own data."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cm3.common.paths import expand
from cm3.datasets.base_config import WithImages
from cm3.datasets.files.tables_config import InteractionsFile, ItemsFile
from cm3.datasets.images.config import Images


class Files(WithImages):
    """A user's own data."""

    source: Literal["files"]
    interactions: InteractionsFile = Field(description="table of who bought, clicked or rated what")
    items: ItemsFile | None = Field(
        default=None, description="table of items; without it, items have neither text nor image"
    )
    images: Images | None = Field(default=None, description="images; without it, items have none")

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "Files":
        if self.images is None:
            return self
        named = self.items is not None and self.items.columns.image is not None
        if self.images.folder is None and not named:
            raise ValueError("images needs a folder, or items.columns.image with the column of URLs")
        if self.images.folder is not None and self.images.pattern is None and not named:
            raise ValueError("images.folder needs images.pattern, or items.columns.image with the column of file names")
        if self.images.folder is None and not self.images.hosts:
            raise ValueError("images.hosts must list the hosts that images may be fetched from")
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
