"""A question to a vision-language model: an image, and a prompt that may hold fields of its item."""

import hashlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from cm3.common.strict import nearest
from cm3.common.tables import ITEMS, read_table
from extractors.image.item_images import read_images
from extractors.runtime.cache import DIGEST
from extractors.runtime.source import Source
from extractors.spec import BackendSpec
from extractors.text import item_text

PROMPT_FIELDS: tuple[str, ...] = get_args(item_text.Field)
HOLDS = "may hold " + ", ".join(f"{{{name}}}" for name in PROMPT_FIELDS) + "."


@dataclass(frozen=True)
class Prompted:
    """An image's original bytes and the prompt that goes with it."""

    image: bytes
    prompt: str


class PromptedSpec(BackendSpec):
    """The fields of what shows a model each image together with a prompt."""

    prompt: str = Field(min_length=1, description="What the model is asked; " + HOLDS)
    field_chars: int = Field(300, gt=0, description="An item's field in the prompt is cut to so many characters.")
    max_pixels: int = Field(262_144, ge=784, description="Images of a larger area are reduced to it first.")

    @field_validator("prompt")
    @classmethod
    def _prompt_names_fields(cls, value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        for _, name, form, conversion in parts:
            if name is not None and (name not in PROMPT_FIELDS or form or conversion):
                raise ValueError(f"{{{name}}} is no field of an item{nearest(name, PROMPT_FIELDS)}")
        return value

    def needs(self) -> set[str]:
        """Return items and manifest."""
        return {"items", "manifest"}

    def read(self, inputs: Mapping[str, Path]) -> Source[Prompted]:
        """Return the images of the manifest, each with the prompt of its item."""
        images = read_images(inputs["items"], inputs["manifest"])
        items = read_table(inputs["items"], ITEMS, list(PROMPT_FIELDS))

        def stream(rows: np.ndarray) -> Iterator[Prompted]:
            fields = items.take(rows).to_pylist()
            for one, image in zip(fields, images.stream(rows), strict=True):
                yield Prompted(image, self.prompt_of(one))

        digests = (
            image and hashlib.sha256(image + self.prompt_of(one).encode("utf-8", "surrogatepass")).digest()
            for image, one in zip(images.digests.to_pylist(), items.to_pylist(), strict=True)
        )
        return Source(images.item_ids, images.status, images.rows, stream, pa.array(digests, DIGEST), images.errors)

    def prompt_of(self, item: Mapping[str, Any]) -> str:
        """Return the prompt with the item's fields in their places, empty where the item lacks one."""
        return self.prompt.format(
            **{name: item_text.clean(item.get(name))[: self.field_chars] for name in PROMPT_FIELDS}
        )
