"""Texts to vectors with sentence-transformers."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from extractors import text_of
from extractors.device import Batch, resolve_device, torch_dtype
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.hub import model_path, without_bars
from extractors.model_spec import ModelSpec
from extractors.source import Source
from stages.errors import UserError

log = logging.getLogger(__name__)

_LONG = 512
_TOKENS_PER_BATCH = {"cpu": 2048, "mps": 16_384, "cuda": 65_536}


class SentenceTransformersSpec(ModelSpec):
    """A text extractor of the sentence-transformers family."""

    modalities: ClassVar[tuple[str, ...]] = ("text",)

    modality: Literal["text"] = Field(description="Always text.")
    backend: Literal["sentence-transformers"] = Field(description="Encode texts with a sentence-transformers model.")
    fields: list[text_of.Field] = Field(
        list(text_of.FIELDS), min_length=1, description="Item fields that make the text, in this order."
    )
    prompt: str | None = Field(None, description="Put before each text; by default the model's own default prompt.")
    max_length: int | None = Field(None, gt=0, description="Longest text in tokens; by default the model's own limit.")
    normalise: bool = Field(True, description="Scale vectors to unit length.")
    truncate_dim: int | None = Field(None, gt=0, description="Keep the first so many dimensions (Matryoshka models).")

    @model_validator(mode="after")
    def _fields_once(self) -> "SentenceTransformersSpec":
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"fields names a field twice: {self.fields}")
        return self

    def read(self, inputs: Mapping[str, Path]) -> Source[str]:
        """Return the captions where the stage is given captions, else the texts of the items."""
        if "captions" in inputs:
            return text_of.read_captions(inputs["items"], inputs["captions"])
        return text_of.read_texts(inputs["items"], self.fields)

    def load(self) -> "SentenceTransformersExtractor":
        """Load the model."""
        return SentenceTransformersExtractor(self)


class SentenceTransformersExtractor(Extractor[str]):
    """A loaded sentence-transformers model."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        from sentence_transformers import SentenceTransformer

        self.spec = spec
        self.device = resolve_device(spec.device)
        folder = model_path(spec)
        without_bars()
        try:
            self.model = SentenceTransformer(
                str(folder), device=self.device, local_files_only=True, trust_remote_code=False,
                model_kwargs={"dtype": torch_dtype(spec.precision), "use_safetensors": True},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{folder}: not a sentence-transformers model that can be loaded safely: {error}"
            ) from error
        if spec.max_length is not None:
            self.model.max_seq_length = spec.max_length
        self.limit: int = self.model.max_seq_length or _LONG
        full = self.model.get_embedding_dimension()
        if spec.truncate_dim is not None and full is not None and spec.truncate_dim > full:
            raise UserError(f"truncate_dim = {spec.truncate_dim}: the model's vectors have {full} dimensions")
        self.dim = spec.truncate_dim or full or self._forward(["a"]).shape[1]
        tokens = _TOKENS_PER_BATCH[self.device] if spec.batch_size is None else spec.batch_size * min(self.limit, _LONG)
        self.tokens = Batch(tokens)

    def input_of(self, item: Mapping[str, Any]) -> str | None:
        """Return the item's text, made of the spec's fields."""
        return text_of.text_of(item, self.spec.fields)

    def facts(self) -> dict[str, Any]:
        """Return the token limit and the prompt in use."""
        return {"max_length": self.limit, "prompt": self._prompt(), "modules": [type(m).__name__ for m in self.model]}

    def run(self, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        """Encode texts, longest first, in batches of about equal numbers of tokens; the order is restored.

        Counts `truncated_texts`: those longer than the limit, whose end the model does not see.
        """
        texts = list(inputs)
        lengths = self._lengths(texts)
        vectors: dict[int, np.ndarray] = {}
        # The longest first: what doesn't fit into memory shows at once, and padding stays small.
        order = np.argsort(-np.minimum(lengths, self.limit), kind="stable")
        start = 0
        while start < len(order):
            part = order[start : start + self._fitting(lengths, order, start)]
            encoded = self.tokens.attempt(self._forward, [texts[row] for row in part])
            if encoded is None:
                continue
            vectors.update(zip(part.tolist(), encoded, strict=True))
            start += len(part)
            advance(len(part), ok=len(part))
        result = collect(vectors, {}, len(texts), self.dim)
        result.counts["truncated_texts"] = int((lengths > self.limit).sum())
        return result

    def _fitting(self, lengths: np.ndarray, order: np.ndarray, start: int) -> int:
        longest = min(int(lengths[order[start]]), self.limit)
        return max(1, self.tokens.size // max(1, longest))

    def _forward(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self.model.encode(
            list(texts), prompt=self.spec.prompt, batch_size=len(texts), show_progress_bar=False,
            normalize_embeddings=self.spec.normalise, truncate_dim=self.spec.truncate_dim, convert_to_tensor=True,
        )  # fmt: skip
        return vectors.float().cpu().numpy()

    def _prompt(self) -> str:
        if self.spec.prompt is not None:
            return self.spec.prompt
        return self.model.prompts.get(self.model.default_prompt_name or "") or ""

    def _lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n,) token counts before truncation, special tokens included."""
        tokenizer = self.model.tokenizer
        prompt = self._prompt()
        lengths: list[int] = []
        with _quiet_tokenizer():
            for start in range(0, len(texts), 256):
                prompted = [prompt + text for text in texts[start : start + 256]]
                lengths.extend(map(len, tokenizer(prompted, truncation=False, padding=False)["input_ids"]))
        return np.array(lengths, dtype=np.int64)


@contextlib.contextmanager
def _quiet_tokenizer() -> Iterator[None]:
    """Keep the tokenizer from warning about long texts: they are counted and reported instead."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
