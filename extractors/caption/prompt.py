"""Input of a vision-language model: an image and a prompt that may contain fields of its item."""

import hashlib
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, JsonValue, field_validator, model_validator

from cm3.common.strict import nearest
from cm3.common.tables import ITEMS, read_table
from extractors.image.item_images import read_images
from extractors.runtime.cache import DIGEST
from extractors.runtime.source import Source
from extractors.spec import BackendSpec
from extractors.text import item_text

PROMPT_FIELDS: tuple[str, ...] = get_args(item_text.Field)
PLACEHOLDERS = "may contain " + ", ".join(f"{{{name}}}" for name in PROMPT_FIELDS) + "."

# All known control tokens of chat models contain these brackets: <|im_end|>, <image>, </s>, [INST].
_BRACKETS = str.maketrans("<>[]", "‹›()")
_NOT_OF_TEMPLATES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "load_audio_from_video",
        "messages",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tools",
    }
)
"""Arguments of apply_chat_template that are not variables of a template."""


@dataclass(frozen=True)
class Prompted:
    """The original bytes of an image and its prompt."""

    image: bytes
    prompt: str


class PromptedSpec(BackendSpec):
    """Settings of backends that give a model an image together with a prompt."""

    prompt: str = Field(min_length=1, description="Prompt of the model; " + PLACEHOLDERS)
    field_chars: int = Field(300, gt=0, description="Maximum number of characters of each item field in the prompt.")
    max_pixels: int = Field(
        262_144, ge=784, description="Maximum area of an image in pixels; larger images are downscaled."
    )
    min_pixels: int | None = Field(
        None, gt=0, description="Minimum area of an image in pixels; smaller images are upscaled; default: none."
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="System message before the prompt; default: none, or the template's own."
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        None,
        min_length=1,
        description="Variables of the model's chat template, such as {enable_thinking: false}; default: none.",
    )

    @field_validator("prompt")
    @classmethod
    def _prompt_names_fields(cls, value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        for _, name, form, conversion in parts:
            if name is not None and (name not in PROMPT_FIELDS or form or conversion):
                raise ValueError(f"{{{name}}} is not a field of an item{nearest(name, PROMPT_FIELDS)}")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_the_template(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        if reserved := sorted(_NOT_OF_TEMPLATES & set(value or ())):
            raise ValueError(f"{reserved[0]} is not a variable of a chat template; remove it")
        return value

    @model_validator(mode="after")
    def _pixel_limits_in_order(self) -> "PromptedSpec":
        if self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels = {self.min_pixels} exceeds max_pixels = {self.max_pixels}")
        return self

    def needs(self) -> set[str]:
        """Return items and manifest."""
        return {"items", "manifest"}

    def read(self, inputs: Mapping[str, Path]) -> Source[Prompted]:
        """Return the images of the manifest, each with the prompt of its item."""
        return read_prompted(inputs, self.prompt_of)

    def prompt_of(self, item: Mapping[str, Any]) -> str:
        """Return the prompt for an item, each placeholder replaced by the item's field (empty if missing)."""
        return self.prompt.format(
            **{name: item_text.clean(item.get(name))[: self.field_chars] for name in PROMPT_FIELDS}
        )

    def chat_facts(self) -> dict[str, Any]:
        """Return the system prompt and the variables of the chat template, where they are set."""
        facts = {"system_prompt": self.system_prompt, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in facts.items() if value is not None}

    def pixel_facts(self) -> dict[str, int]:
        """Return the limits of an image's area."""
        return {"max_pixels": self.max_pixels} | ({} if self.min_pixels is None else {"min_pixels": self.min_pixels})


def without_control_tokens(text: str) -> str:
    """Return a text with its brackets replaced, so that no part of it is a control token of a model."""
    return text.translate(_BRACKETS)


def read_prompted(inputs: Mapping[str, Path], prompt_of: Callable[[Mapping[str, Any]], str]) -> Source[Prompted]:
    """Return the images of a manifest, each with the text that `prompt_of` makes of its item's fields."""
    images = read_images(inputs["items"], inputs["manifest"])
    items = read_table(inputs["items"], ITEMS, list(PROMPT_FIELDS))

    def stream(rows: np.ndarray) -> Iterator[Prompted]:
        fields = items.take(rows).to_pylist()
        for one, image in zip(fields, images.stream(rows), strict=True):
            yield Prompted(image, prompt_of(one))

    digests = (
        image and hashlib.sha256(image + prompt_of(one).encode("utf-8", "surrogatepass")).digest()
        for image, one in zip(images.digests.to_pylist(), items.to_pylist(), strict=True)
    )
    return Source(images.item_ids, images.status, images.rows, stream, pa.array(digests, DIGEST), images.errors)
