"""Common to all captioners: settings, default prompt, image preparation and the result."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from cm3.common.image_decode import UnreadableError, decode
from cm3.common.tables import FAILED, MISSING, OK
from extractors.caption.prompt import PLACEHOLDERS, Prompted, PromptedSpec, without_control_tokens
from extractors.caption.thoughts import split_thoughts
from extractors.extractor import Advance, Model, Result, silent
from extractors.image.item_images import image_of
from extractors.text.item_text import clean

PROMPT = (
    "Describe this product in one or two plain sentences for someone who decides whether it suits them: "
    "what it is, its colours, material, pattern, shape and style."
)
MAX_ASPECT = 20
"""Longest side over shortest side of an image, as a model gets it."""
NOTHING_AFTER_THOUGHT = "the model answered nothing after its thought"
UNFINISHED = "the answer is an unfinished thought"
UNFINISHED_CUT = "the thought was cut at the limit of tokens (set max_thought_tokens, or chat_template_kwargs: {enable_thinking: false})"


class CaptionSpec(PromptedSpec):
    """Settings of all captioners."""

    # `encoder` reads the captions and does not change them.
    runtime_fields: ClassVar[frozenset[str]] = PromptedSpec.runtime_fields | {"encoder"}
    modalities: ClassVar[tuple[str, ...]] = ("caption",)
    shard_items: ClassVar[int | None] = 256
    replace_brackets: ClassVar[bool] = True
    """Whether brackets in a prompt are replaced; False if the tokenizer itself treats control tokens in it as text."""

    modality: Literal["caption"] = Field(description="Always caption.")
    encoder: str = Field(description="Name of the text extractor that encodes the captions.")
    prompt: str = Field(PROMPT, min_length=1, description="Prompt of the model; " + PLACEHOLDERS)
    max_new_tokens: int = Field(64, gt=0, le=128, description="Maximum length of a caption in tokens.")
    max_thought_tokens: int | None = Field(
        None,
        gt=0,
        le=32_768,
        description="Tokens that a model which thinks first may generate in addition to max_new_tokens; default: none.",
    )

    def token_limit(self) -> int:
        """Return the maximum number of generated tokens: thoughts and caption."""
        return self.max_new_tokens + (self.max_thought_tokens or 0)

    def prompt_of(self, item: Mapping[str, Any]) -> str:
        """Return the prompt for an item, each placeholder replaced by the item's field (empty if missing)."""
        prompt = super().prompt_of(item)
        # After formatting: two harmless fields in a row may form a control token.
        return without_control_tokens(prompt) if self.replace_brackets else prompt

    def facts(self, model: str) -> dict[str, Any]:
        """Return the metadata of the captions file: model, prompt, decoding and image preprocessing.

        Args:
            model: readable name of the model, with its revision or digest.
        """
        return {
            "model": model,
            "prompt": self.prompt,
            "prompt_key": hashlib.sha256(self.prompt.encode()).hexdigest()[:12],
            "decoding": {"strategy": "greedy", "max_new_tokens": self.max_new_tokens}
            | ({} if self.max_thought_tokens is None else {"max_thought_tokens": self.max_thought_tokens}),
            "preprocessing": {**self.pixel_facts(), "max_aspect": MAX_ASPECT, "field_chars": self.field_chars},
            **self.chat_facts(),
        }


class Answer(NamedTuple):
    """A model's answer for one image.

    Attributes:
        text: the caption, "" if there is none.
        tokens: number of generated tokens.
        cut: whether the text was truncated at max_new_tokens.
        reason: reason for an empty text.
    """

    text: str
    tokens: int = 0
    cut: bool = False
    reason: str = "the model answered nothing"

    @classmethod
    def of(cls, text: str, tokens: int, cut: bool, inside: bool = False) -> "Answer":
        """Return the answer in a generated text, without the thoughts in it.

        Args:
            text: the generated text, with the markers of thoughts.
            tokens: number of generated tokens.
            cut: whether the text was truncated.
            inside: whether the text begins inside a thought, because the prompt ends with the opening marker.
        """
        parts = split_thoughts(text, inside)
        if parts.unfinished:
            return cls("", tokens, reason=UNFINISHED_CUT if cut else UNFINISHED)
        caption = clean(parts.answer)
        if parts.thought and not caption:
            return cls("", tokens, reason=UNFINISHED_CUT if cut else NOTHING_AFTER_THOUGHT)
        return cls(caption, tokens, cut)


@dataclass(kw_only=True)
class CaptionResult(Result):
    """Captions of n images.

    Attributes:
        captions: n texts, "" where not ok.
        tokens: (n,) int32 generated tokens.
    """

    captions: list[str]
    tokens: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "CaptionResult":
        """Build the result; empty answers are failed with their reason."""
        return cls(
            captions=[answer.text for answer in answers],
            tokens=np.array([answer.tokens for answer in answers], dtype=np.int32),
            status=np.array([OK if answer.text else FAILED for answer in answers], dtype=object),
            errors={row: answer.reason for row, answer in enumerate(answers) if not answer.text},
            counts={"captions_cut": sum(answer.cut for answer in answers)},
        )

    def columns(self, dtype: str) -> dict[str, pa.Array]:
        """Return captions and tokens."""
        return {"caption": pa.array(self.captions, pa.string()), "tokens": pa.array(self.tokens, pa.int32())}

    def check(self, names: Sequence[str]) -> None:
        """Accept any text: captions have no invalid values."""


class Captioner(Model[Prompted]):
    """A loaded captioner."""

    spec: CaptionSpec

    @abstractmethod
    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> CaptionResult:
        """Caption images in input order; undecodable images and empty answers are failed with the reason."""

    def caption(self, items: Sequence[Mapping[str, Any]]) -> CaptionResult:
        """Return the captions of items with an `image` (bytes or a path); items without one are missing."""
        images = [image_of(item) for item in items]
        rows = [row for row, image in enumerate(images) if image is not None]
        asked = (
            Prompted(image, self.spec.prompt_of(item))
            for image, item in zip(images, items, strict=True)
            if image is not None
        )
        found = self.run(asked)
        result = CaptionResult(
            captions=[""] * len(items),
            status=np.full(len(items), MISSING, dtype=object),
            tokens=np.zeros(len(items), np.int32),
            errors={rows[place]: reason for place, reason in found.errors.items()},
            counts=found.counts,
        )
        result.status[rows], result.tokens[rows] = found.status, found.tokens
        for row, text in zip(rows, found.captions, strict=True):
            result.captions[row] = text
        return result


def load_image(data: bytes, max_pixels: int, min_pixels: int | None = None) -> Image.Image | str:
    """Return a decoded image of min_pixels to max_pixels, or the reason why it cannot be decoded."""
    try:
        return limit_size(decode(data), max_pixels, min_pixels)
    except UnreadableError as error:
        return str(error)


def limit_size(image: Image.Image, max_pixels: int, min_pixels: int | None = None) -> Image.Image:
    """Return an image of min_pixels to max_pixels, padded with white to an aspect ratio of at most MAX_ASPECT."""
    shortest = -(-max(image.size) // MAX_ASPECT)
    wide = max(image.width, shortest), max(image.height, shortest)
    scale = (max_pixels / (wide[0] * wide[1])) ** 0.5
    if scale < 1:  # before padding: the canvas of a thin image may not fit into memory
        image, wide = image.resize(_scaled(image.size, scale)), _scaled(wide, scale)
    if image.size != wide:
        canvas = Image.new("RGB", wide, "white")
        canvas.paste(image, ((wide[0] - image.width) // 2, (wide[1] - image.height) // 2))
        image = canvas
    area = image.width * image.height
    return image if min_pixels is None or area >= min_pixels else image.resize(_enlarged(wide, min_pixels, max_pixels))


def _enlarged(size: tuple[int, int], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return a size of at least min_pixels; slightly less where rounding up would exceed max_pixels."""
    scale = (min_pixels / (size[0] * size[1])) ** 0.5
    width, height = math.ceil(size[0] * scale), math.ceil(size[1] * scale)
    return (width, height) if width * height <= max_pixels else _scaled(size, scale)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
