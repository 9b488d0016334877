"""Pictures to captions with a vision-language model through transformers."""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, field_validator

from extractors.ahead import chunks
from extractors.decode import UnreadableError, decode
from extractors.device import Batch, resolve_device, torch_dtype
from extractors.effort import LARGE, check_effort, hours, parameters_of, seconds_per_parameter
from extractors.extractor import Advance, Model, Result, silent
from extractors.hub import model_path, without_bars
from extractors.model_spec import ModelSpec
from extractors.pictures_of import picture_of, read_pictures
from extractors.source import Source, digest_of_rows
from extractors.text_of import FIELDS, clean
from stages.errors import UserError
from stages.strict import nearest
from stages.tables import FAILED, ITEMS, MISSING, OK, read_table

PROMPT = (
    "Describe this product in one or two plain sentences for someone who decides whether it suits them: "
    "what it is, its colours, material, pattern, shape and style."
)
MAX_ASPECT = 20
_PIXELS_PER_TOKEN = 784  # Qwen2.5-VL: a token stands for 28 x 28 pixels
_PICTURES_PER_BATCH = {"cpu": 4, "mps": 4, "cuda": 16}


class TransformersCaptionSpec(ModelSpec):
    """A captioner: a vision-language model whose captions a text extractor then encodes."""

    # `encoder` says what happens to the captions, not what they are.
    runtime_fields: ClassVar[frozenset[str]] = ModelSpec.runtime_fields | {"encoder", "allow_slow"}
    modalities: ClassVar[tuple[str, ...]] = ("caption",)
    shard_items: ClassVar[int | None] = 256

    modality: Literal["caption"] = Field(description="Always caption.")
    backend: Literal["transformers-caption"] = Field(description="Caption pictures with a vision-language model.")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Number format of the model's arithmetic."
    )
    encoder: str = Field(description="Name of the text extractor that turns the captions into vectors.")
    prompt: str = Field(
        PROMPT,
        min_length=1,
        description="What the model is asked; may hold {title}, {brand}, {categories}, {description}.",
    )
    field_chars: int = Field(300, gt=0, description="An item's field in the prompt is cut to so many characters.")
    max_new_tokens: int = Field(64, gt=0, le=128, description="Longest caption in tokens.")
    max_pixels: int = Field(262_144, ge=784, description="Pictures of a larger area are reduced to it first.")
    allow_slow: bool = Field(False, description="Caption on a processor even where that takes hours.")

    @field_validator("prompt")
    @classmethod
    def _prompt_names_fields(cls, value: str) -> str:
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        for _, name, form, conversion in parts:
            if name is not None and (name not in FIELDS or form or conversion):
                raise ValueError(f"{{{name}}} is no field of an item{nearest(name, FIELDS)}")
        return value

    def needs(self) -> set[str]:
        """Return items and manifest."""
        return {"items", "manifest"}

    def read(self, inputs: Mapping[str, Path]) -> Source["Captionable"]:
        """Return the pictures of the manifest, each with the prompt of its item."""
        pictures = read_pictures(inputs["items"], inputs["manifest"])
        items = read_table(inputs["items"], ITEMS).select(list(FIELDS))

        def stream(rows: np.ndarray) -> Iterator[Captionable]:
            fields = items.take(rows).to_pylist()
            for one, picture in zip(fields, pictures.stream(rows), strict=True):
                yield Captionable(picture, self.prompt_of(one))

        prompts = digest_of_rows(self.prompt_of(one) for one in items.to_pylist())
        return Source(
            pictures.item_ids, pictures.status, pictures.rows, stream, pictures.fingerprint + prompts, pictures.errors
        )

    def prompt_of(self, item: Mapping[str, Any]) -> str:
        """Return the prompt with the item's fields in their places, empty where the item lacks one."""
        return self.prompt.format(**{name: clean(item.get(name))[: self.field_chars] for name in FIELDS})

    def warn_of_effort(self, items: int) -> None:
        """Tell the estimated hours of a large model on a processor.

        Raises:
            UserError: they are many, and allow_slow is not set.
        """
        parameters = parameters_of(model_path(self))
        if resolve_device(self.device) == "cpu" and parameters >= LARGE:
            tokens = self.max_pixels // _PIXELS_PER_TOKEN + len(self.prompt) // 4
            speed = seconds_per_parameter(self.precision)
            check_effort(
                parameters, items, hours(parameters, items, tokens, self.max_new_tokens, speed), self.allow_slow
            )

    def load(self) -> "TransformersCaptioner":
        """Load the model."""
        return TransformersCaptioner(self)


@dataclass(frozen=True)
class Captionable:
    """A picture's original bytes and what the model is asked about it."""

    picture: bytes
    prompt: str


@dataclass(kw_only=True)
class Captioned(Result):
    """The captions of n pictures.

    Attributes:
        captions: n texts, "" where not ok.
        tokens: (n,) int32 generated tokens.
    """

    captions: list[str]
    tokens: np.ndarray

    def columns(self) -> dict[str, pa.Array]:
        """Return captions and tokens."""
        return {"caption": pa.array(self.captions, pa.string()), "tokens": pa.array(self.tokens, pa.int32())}

    def check(self, names: Sequence[str]) -> None:
        """Accept any text: what a caption is worth, people can read for themselves."""


class TransformersCaptioner(Model[Captionable]):
    """A loaded vision-language model that captions pictures in batches, greedily."""

    def __init__(self, spec: TransformersCaptionSpec) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.spec = spec
        self.device = resolve_device(spec.device)
        folder = model_path(spec)
        without_bars()
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                dtype=torch_dtype(spec.precision),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder}: not a vision-language model that can be loaded safely: {error}") from error
        # A decoder continues at the right end: with padding there it would continue the padding.
        self.processor.tokenizer.padding_side = "left"
        self.model = model.eval().to(self.device)
        self.batch = Batch(spec.batch_size or _PICTURES_PER_BATCH[self.device])

    def caption(self, items: Sequence[Mapping[str, Any]]) -> Captioned:
        """Return the captions of items with a `picture` (bytes or a path); those without one are missing."""
        pictures = [picture_of(item) for item in items]
        rows = [row for row, picture in enumerate(pictures) if picture is not None]
        asked = (
            Captionable(picture, self.spec.prompt_of(item))
            for picture, item in zip(pictures, items, strict=True)
            if picture is not None
        )
        found = self.run(asked)
        result = Captioned(
            captions=[""] * len(items),
            status=np.full(len(items), MISSING, dtype=object),
            tokens=np.zeros(len(items), np.int32),
            errors={rows[place]: reason for place, reason in found.errors.items()},
        )
        result.status[rows], result.tokens[rows] = found.status, found.tokens
        for row, text in zip(rows, found.captions, strict=True):
            result.captions[row] = text
        return result

    def facts(self) -> dict[str, Any]:
        """Return the architecture, the prompt and the decoding in use."""
        return {
            "model": type(self.model).__name__,
            "prompt": self.spec.prompt,
            "decoding": {"strategy": "greedy", "max_new_tokens": self.spec.max_new_tokens},
            "preprocessing": {"max_pixels": self.spec.max_pixels, "max_aspect": MAX_ASPECT},
        }

    def run(self, inputs: Iterable[Captionable], advance: Advance = silent) -> Captioned:
        """Caption pictures; those that can't be decoded, and empty answers, are failed with the reason."""
        captions: list[str] = []
        tokens: list[int] = []
        errors: dict[int, str] = {}
        for group in chunks(inputs, lambda: self.batch.size):
            pictures = [self._picture(one.picture) for one in group]
            asked = [(p, one.prompt) for p, one in zip(pictures, group, strict=True) if not isinstance(p, str)]
            answers = iter(self.batch.all(self._generate, asked))
            failed = 0
            for picture in pictures:
                answer, count = ("", 0) if isinstance(picture, str) else next(answers)
                if not answer:
                    errors[len(captions)] = picture if isinstance(picture, str) else "the model answered nothing"
                    failed += 1
                captions.append(answer)
                tokens.append(count)
            advance(len(group), ok=len(group) - failed, failed=failed)
        status = np.array([OK if caption else FAILED for caption in captions], dtype=object)
        return Captioned(captions=captions, status=status, tokens=np.array(tokens, dtype=np.int32), errors=errors)

    def _picture(self, data: bytes) -> Image.Image | str:
        try:
            return capped(decode(data), self.spec.max_pixels)
        except UnreadableError as reason:
            return str(reason)

    def _generate(self, asked: Sequence[tuple[Image.Image, str]]) -> list[tuple[str, int]]:
        """Return the answer and its number of tokens for each picture and prompt."""
        import torch

        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture, prompt in asked
        ]
        batch = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
            sanitize_control_tokens=True,  # a title may hold the model's own control tokens
        ).to(self.device, dtype=self.model.dtype)  # fmt: skip
        with torch.inference_mode():
            # The model's own generation config may sample or penalise; the caption is to be the plain argmax.
            output = self.model.generate(
                **batch, max_new_tokens=self.spec.max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        answers = output[:, batch["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        padding = self.processor.tokenizer.pad_token_id
        counts = (answers != padding).sum(dim=1).tolist()
        return [(clean(text), int(count)) for text, count in zip(texts, counts, strict=True)]


def capped(picture: Image.Image, max_pixels: int) -> Image.Image:
    """Return a picture of at most max_pixels, widened with white where one side is over 20 times the other."""
    shortest = -(-max(picture.size) // MAX_ASPECT)
    if min(picture.size) < shortest:
        wide = Image.new("RGB", (max(picture.width, shortest), max(picture.height, shortest)), "white")
        wide.paste(picture, ((wide.width - picture.width) // 2, (wide.height - picture.height) // 2))
        picture = wide
    scale = (max_pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    return picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
