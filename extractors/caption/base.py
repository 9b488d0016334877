"""What all captioners share: their settings, the prompt, the image that a model is shown, and the captions."""

import hashlib
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
from extractors.caption.prompt import HOLDS, Prompted, PromptedSpec
from extractors.extractor import Advance, Model, Result, silent
from extractors.image.item_images import image_of

PROMPT = (
    "Describe this product in one or two plain sentences for someone who decides whether it suits them: "
    "what it is, its colours, material, pattern, shape and style."
)
MAX_ASPECT = 20
# Every control token that chat models are known to have is written with these: <|im_end|>, <image>, </s>, [INST].
_HARMLESS = str.maketrans("<>[]", "‹›()")


class CaptionSpec(PromptedSpec):
    """The fields that all captioners share."""

    # `encoder` says what happens to the captions, not what they are.
    runtime_fields: ClassVar[frozenset[str]] = PromptedSpec.runtime_fields | {"encoder"}
    modalities: ClassVar[tuple[str, ...]] = ("caption",)
    shard_items: ClassVar[int | None] = 256
    neutralised: ClassVar[bool] = True
    """Whether brackets in a prompt are replaced: not where the tokenizer itself tells text from control tokens."""

    modality: Literal["caption"] = Field(description="Always caption.")
    encoder: str = Field(description="Name of the text extractor that turns the captions into vectors.")
    prompt: str = Field(PROMPT, min_length=1, description="What the model is asked; " + HOLDS)
    max_new_tokens: int = Field(64, gt=0, le=128, description="Longest caption in tokens.")

    def prompt_of(self, item: Mapping[str, Any]) -> str:
        """Return the prompt with the item's fields in their places, empty where the item lacks one."""
        prompt = super().prompt_of(item)
        # As a whole: two harmless fields side by side may spell a control token.
        return prompt.translate(_HARMLESS) if self.neutralised else prompt

    def facts(self, model: str) -> dict[str, Any]:
        """Return what the captions file tells of how they were made.

        Args:
            model: which model wrote them, as a reader would name it.
        """
        return {
            "model": model,
            "prompt": self.prompt,
            "prompt_key": hashlib.sha256(self.prompt.encode()).hexdigest()[:12],
            "decoding": {"strategy": "greedy", "max_new_tokens": self.max_new_tokens},
            "preprocessing": {"max_pixels": self.max_pixels, "max_aspect": MAX_ASPECT, "field_chars": self.field_chars},
        }


class Answer(NamedTuple):
    """What a model said of an image.

    Attributes:
        text: the caption, "" where there is none.
        tokens: generated tokens.
        cut: whether the model would have gone on, had it been allowed more tokens.
        reason: why there is no caption.
    """

    text: str
    tokens: int = 0
    cut: bool = False
    reason: str = "the model answered nothing"


@dataclass(kw_only=True)
class Captioned(Result):
    """The captions of n images.

    Attributes:
        captions: n texts, "" where not ok.
        tokens: (n,) int32 generated tokens.
    """

    captions: list[str]
    tokens: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Captioned":
        """Return answers as captions; empty ones are failed with their reason."""
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
        """Accept any text: what a caption is worth, people can read for themselves."""


class Captioner(Model[Prompted]):
    """A captioner that is ready to be asked."""

    spec: CaptionSpec

    @abstractmethod
    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Captioned:
        """Caption images; those that can't be decoded, and empty answers, are failed with the reason."""

    def caption(self, items: Sequence[Mapping[str, Any]]) -> Captioned:
        """Return the captions of items with a `image` (bytes or a path); those without one are missing."""
        images = [image_of(item) for item in items]
        rows = [row for row, image in enumerate(images) if image is not None]
        asked = (
            Prompted(image, self.spec.prompt_of(item))
            for image, item in zip(images, items, strict=True)
            if image is not None
        )
        found = self.run(asked)
        result = Captioned(
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


def readable(data: bytes, max_pixels: int) -> Image.Image | str:
    """Return an image as a model is shown it, or the reason why it can't be decoded."""
    try:
        return capped(decode(data), max_pixels)
    except UnreadableError as reason:
        return str(reason)


def capped(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return an image of at most max_pixels, widened with white where one side is over 20 times the other."""
    shortest = -(-max(image.size) // MAX_ASPECT)
    wide = max(image.width, shortest), max(image.height, shortest)
    scale = (max_pixels / (wide[0] * wide[1])) ** 0.5
    if scale < 1:  # before the white is put round it: a thin image's canvas may be too large for any memory
        image, wide = image.resize(_scaled(image.size, scale)), _scaled(wide, scale)
    if image.size == wide:
        return image
    canvas = Image.new("RGB", wide, "white")
    canvas.paste(image, ((wide[0] - image.width) // 2, (wide[1] - image.height) // 2))
    return canvas


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
