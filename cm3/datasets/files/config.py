"""Settings of the user's own tables."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cm3.common.paths import expand
from cm3.datasets.files.tables_config import InteractionsFile, ItemsFile
from cm3.datasets.images.config import Images
from cm3.datasets.spec import SourceWithImages


class FilesSpec(SourceWithImages):
    """The user's own tables and images."""

    version = 1
    reader = "cm3.datasets.files.reader:Reader"

    source: Literal["files"]
    interactions: InteractionsFile = Field(
        description="Table of interactions: users and the items that they bought, clicked or rated."
    )
    items: ItemsFile | None = Field(
        default=None, description="Table of items; without it, items have neither text nor image."
    )
    images: Images | None = Field(default=None, description="Product images; without it, items have none.")

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "FilesSpec":
        if self.images is None:
            return self
        named = self.items is not None and self.items.columns.image is not None
        if self.images.folder is None and not named:
            raise ValueError("images needs a folder, or items.columns.image with the column of URLs")
        if self.images.folder is not None and self.images.pattern is None and not named:
            raise ValueError("images.folder needs images.pattern, or items.columns.image with the column of file names")
        if self.images.folder is None and not self.images.hosts:
            raise ValueError("images.hosts must list the hosts that images may be downloaded from")
        return self

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the user's own files."""
        inputs = {"interactions": expand(self.interactions.path)}
        if self.items is not None:
            inputs["items"] = expand(self.items.path)
        return inputs

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage; it does not include the paths of its inputs."""
        tables = {"interactions": self.interactions, "items": self.items}
        found = {
            **super().prepare_spec(),
            **{
                name: table and {"format": table.resolved_format, "columns": table.columns.identity(), **table.layout()}
                for name, table in tables.items()
            },
        }
        found["interactions"] |= self.interactions.rows()
        return found

    def has_labels(self) -> bool:
        """Return whether the interactions have a column with their split."""
        return self.interactions.columns.split is not None

    def held_in_memory(self, path: str) -> bool:
        """Return True: all formats are held in memory while they are parsed."""
        return True
