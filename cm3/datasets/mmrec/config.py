"""Config of a folder in the layout of the MMRec toolbox: `data/{name}/` with {name}.inter, mappings and features."""

import gzip
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.gzip import is_gzip
from cm3.common.paths import expand
from cm3.datasets.base_config import WithImages
from cm3.datasets.images.config import Images

_LABEL = "x_label"
_LONGEST_HEADER = 65_536


class MMRec(WithImages):
    """A data set as MMRec's `data/` folder holds it, its split and its features as published."""

    source: Literal["mmrec"]
    folder: str = Field(
        min_length=1, description="the data set's folder, such as MMRec/data/baby; ~ and $VARIABLES work"
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[^/\\]+$",
        description="the interactions are {name}.inter or {name}.inter.gz; by default the folder's own name",
    )
    unknown_items: Literal["drop", "keep", "error"] = Field(
        default="keep", description="as above; a published split is taken whole, hence the default"
    )
    images: Images | None = Field(
        default=None,
        description="a local folder of images by item id, or hosts to fetch those from that meta-{name}.csv names",
    )

    @model_validator(mode="after")
    def _images_can_be_found(self) -> "MMRec":
        if self.images is not None and self.images.folder is not None and self.images.pattern is None:
            raise ValueError("images.folder needs images.pattern, such as {item_id}.jpg")
        if self.images is not None and self.images.folder is None and not self.images.hosts:
            raise ValueError("images needs a folder, or hosts that images may be fetched from")
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
        plain = self._place / f"{self._stem}.inter"
        packed = plain.with_name(f"{plain.name}.gz")
        return packed if packed.is_file() and not plain.is_file() else plain

    def _check_folder(self) -> None:
        if not self._place.is_dir():
            raise UserError(f"{self._place}: no such folder; set the data set's folder to where MMRec's files are")
        if not self._interactions.is_file():
            there = sorted(path.name for path in self._place.glob("*.inter*"))
            hint = f"; set name, as there is {', '.join(there)}" if there else ""
            raise UserError(f"{self._place}: holds no {self._stem}.inter and no {self._stem}.inter.gz{hint}")

    def has_labels(self) -> bool:
        """Whether the interactions have a column x_label. What cannot be looked into yet is taken to have one."""
        return self._labels_found

    @cached_property
    def _labels_found(self) -> bool:
        # Looked up once, as the config is read before every job. Errors are left to the stage that reads the file.
        try:
            path = self._interactions
            with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
                header = file.readline(_LONGEST_HEADER).decode(errors="replace")
        except (OSError, EOFError, ValueError, UserError):
            return True
        return _LABEL in header.removeprefix("\ufeff").rstrip("\r\n").split("\t")

    def prepare_inputs(self, name: str) -> dict[str, str]:
        """Return the interactions, and the mappings and metadata that are there.

        Raises:
            UserError: there is no such folder, or it has no interactions.
        """
        self._check_folder()
        optional = {
            "item_ids": self._place / "i_id_mapping.csv",
            "user_ids": self._place / "u_id_mapping.csv",
            "meta": self._place / f"meta-{self._stem}.csv",
        }
        found = {kind: str(path) for kind, path in optional.items() if path.is_file()}
        return {"interactions": str(self._interactions), **found}

    def published_vectors(self, name: str, modality: str) -> dict[str, str]:
        """Return {modality}_feat.npy, and the file that tells which item a row belongs to.

        Raises:
            UserError: there is no such folder, or it has no interactions.
        """
        inputs = self.prepare_inputs(name)
        vectors = self._place / f"{modality}_feat.npy"
        # Without a mapping the interactions tell how many items there must be.
        ids = inputs.get("item_ids", inputs["interactions"])
        return {"vectors": str(vectors), "ids": ids} if vectors.is_file() else {}
