"""Settings of a folder in the format of the MMRec toolbox: `data/{name}/` with {name}.inter, mappings and features."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.input_files import contents_of
from cm3.common.paths import expand
from cm3.datasets.download.gzip import GZIP_ERRORS
from cm3.datasets.files.lines import open_bytes
from cm3.datasets.images.config import Images
from cm3.datasets.mmrec.format import ITEM_MAPPING, LABEL, USER_MAPPING, interactions_file, metadata_file, vectors_file
from cm3.datasets.mmrec.published import published_files
from cm3.datasets.spec import SourceWithImages

_LONGEST_HEADER = 65_536


class MMRecSpec(SourceWithImages):
    """A dataset folder of MMRec, with its published split and features."""

    version = 1
    libraries = ("numpy", "pyarrow")
    reader = "cm3.datasets.mmrec.reader:Reader"

    source: Literal["mmrec"]
    folder: str = Field(
        min_length=1, description="The dataset's folder, such as MMRec/data/baby; ~ and $VARIABLES are expanded."
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[^/\\]+$",
        description="Name of the interactions file without .inter or .inter.gz; default: the folder's name.",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep", description="As for every dataset. Default keep: a published split is used completely."
    )
    images: Images | None = Field(
        default=None,
        description="A local folder of images by item id, or the hosts of the image URLs in meta-{name}.csv.",
    )

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "MMRecSpec":
        if self.images is not None and self.images.folder is not None and self.images.pattern is None:
            raise ValueError("images.folder needs images.pattern, such as {item_id}.jpg")
        if self.images is not None and self.images.folder is None and not self.images.hosts:
            raise ValueError("images needs a folder, or hosts that images may be downloaded from")
        return self

    @property
    def _place(self) -> Path:
        return Path(expand(self.folder))

    @property
    def _stem(self) -> str:
        place = self._place
        return self.name or (place.name if place.name not in ("", "..") else place.resolve().name)

    @property
    def _interactions(self) -> Path:
        plain = self._place / interactions_file(self._stem)
        packed = plain.with_name(f"{plain.name}.gz")
        return packed if packed.is_file() and not plain.is_file() else plain

    def _check_folder(self) -> None:
        if not self._place.is_dir():
            raise UserError(f"{self._place}: no such folder; set the dataset's folder to the one with MMRec's files")
        if not self._interactions.is_file():
            found = sorted(path.name for path in self._place.glob(f"{interactions_file('*')}*"))
            hint = f"set name, the folder has {', '.join(found)}" if found else contents_of(self._place)
            file = interactions_file(self._stem)
            raise UserError(f"{self._place}: has no {file} and no {file}.gz; {hint}")

    def has_labels(self) -> bool:
        """Return whether the interactions have a column x_label; True for a file that cannot be read yet."""
        return self._labels_found

    @cached_property
    def _labels_found(self) -> bool:
        # Cached, as the configuration is read before every job. The stage that reads the file reports its errors.
        try:
            with open_bytes(self._interactions) as file:
                header = file.readline(_LONGEST_HEADER).decode(errors="replace")
        except (OSError, ValueError, UserError, *GZIP_ERRORS):
            return True
        return LABEL in header.removeprefix("\ufeff").rstrip("\r\n").split("\t")

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the interactions, and the mappings and metadata where they exist.

        Raises:
            UserError: the folder does not exist or has no interactions.
        """
        self._check_folder()
        optional = {
            "item_ids": self._place / ITEM_MAPPING,
            "user_ids": self._place / USER_MAPPING,
            "meta": self._place / metadata_file(self._stem),
        }
        found = {kind: str(path) for kind, path in optional.items() if path.is_file()}
        return {"interactions": str(self._interactions), **found}

    @classmethod
    def published_files(cls, inputs: Mapping[str, Path]) -> dict[str, bool]:
        """Return whether the folder's files are those that MMRec's authors publish, for files whose fingerprints are known."""
        return published_files(inputs["interactions"])

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return {modality}_feat.npy, and the file with the item of each row.

        Raises:
            UserError: the folder does not exist or has no interactions.
        """
        inputs = self.prepare_inputs(name)
        vectors = self._place / vectors_file(modality)
        # Without a mapping, the interactions determine the number of items.
        ids = inputs.get("item_ids", inputs["interactions"])
        return {"vectors": str(vectors), "ids": ids} if vectors.is_file() else {}
