"""Base of text encoders: texts of items, and batches with about equal numbers of tokens."""

import sys
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cm3.common.device import select_device
from cm3.common.errors import UserError
from cm3.common.tables import OK
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.runtime.batch import Batch
from extractors.runtime.slabs import Download
from extractors.runtime.source import Source
from extractors.text import item_text
from extractors.text import reviews as review_text
from extractors.text.tokens import TokenIds
from extractors.weights.hub import quiet
from extractors.weights.spec import CodeSpec

if TYPE_CHECKING:
    import torch

USUAL_LIMIT = 512
"""Token limit of models that do not define one."""
NO_LIMIT = sys.maxsize
"""Token limit of models without positions, which truncate nothing."""
UNSET_LIMIT = 10**18
"""Tokenizers without a limit report a larger one, 10**30, which no array of 64-bit integers holds."""

_TOKENS_PER_BATCH = {"cpu": 2048, "mps": 16_384, "cuda": 65_536}
_TEXTS_AT_ONCE = 256


class TextModelSpec(CodeSpec):
    """A spec of a text encoder: of items' own texts, or with modality reviews of the reviews in the training split."""

    modalities: ClassVar[tuple[str, ...]] = ("text", review_text.MODALITY)

    fields: list[item_text.Field] = Field(
        list(item_text.FIELDS), min_length=1, description="Item fields that the text is made of, in this order."
    )
    prompt: str | None = Field(None, description="Text before each item text; default: the model's own default prompt.")
    max_length: int | None = Field(
        None, gt=0, description="Longer texts are truncated to so many tokens; default: the model's limit."
    )
    normalise: bool = Field(True, description="Scale vectors to unit length.")
    truncate_dim: int | None = Field(
        None, gt=0, description="Truncate vectors to the first dimensions (Matryoshka models)."
    )

    reviews: review_text.ReviewChoice | None = Field(
        None,
        description="Reviews that are encoded, for modality reviews; each vector is the mean of an item's reviews.",
    )

    @model_validator(mode="after")
    def _settings_of_reviews(self) -> "TextModelSpec":
        if self.reviews is not None and not self.reads_reviews:
            raise ValueError(f"reviews is for modality reviews, but modality is {self.modality}; remove it")
        if self.reads_reviews and "fields" in self.model_fields_set:
            raise ValueError("fields are those of items, but modality is reviews; remove it")
        return self

    @property
    def reads_reviews(self) -> bool:
        """Whether the texts are those of reviews."""
        return self.modality == review_text.MODALITY

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output; for reviews, their number and order in place of an item's fields."""
        found = super().settings()
        if self.reads_reviews:
            del found["fields"]
            found["reviews"] = (self.reviews or review_text.ReviewChoice()).identity()
        return found

    def needs(self) -> set[str]:
        """Return items, for modality reviews also the reviews and the split."""
        return {"items", "reviews", "interactions"} if self.reads_reviews else {"items"}

    def inputs_per_item(self) -> int:
        """Return the largest number of texts per item."""
        return (self.reviews or review_text.ReviewChoice()).count if self.reads_reviews else 1

    @model_validator(mode="after")
    def _fields_once(self) -> "TextModelSpec":
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"duplicate field in fields: {self.fields}")
        return self

    def read(self, inputs: Mapping[str, Path]) -> Source[Any]:
        """Return the captions if the job has captions as input, else the texts of the items or of their reviews."""
        if "captions" in inputs:
            return item_text.read_captions(inputs["items"], inputs["captions"])
        if self.reads_reviews:
            choice = self.reviews or review_text.ReviewChoice()
            return review_text.read_reviews(inputs["items"], inputs["reviews"], inputs["interactions"], choice)
        return item_text.read_texts(inputs["items"], self.fields)


class TextModel(Extractor[Any]):
    """A loaded text encoder. Subclasses set `tokenizer`, `prompt` and `limit`, call `ready`, and implement `forward`.

    Attributes:
        tokenizer: a tokenizer of transformers, unless a subclass overrides `counted`.
        token_ids: the tokens of texts, if `forward` takes them from here; None: it tokenises the texts again.
        prompt: text before each item text.
        limit: maximum number of tokens, special tokens included; longer texts are truncated.
        tokens: batch size in tokens, padding included.
    """

    tokenizer: Any
    token_ids: TokenIds | None = None
    prompt: str
    limit: int

    def __init__(self, spec: TextModelSpec) -> None:
        self.spec = spec
        self.device = select_device(spec.device, "device").type

    def ready(self, full: int | None) -> None:
        """Set the batch size and the dimension.

        Args:
            full: dimension of the vectors before truncation; None: measured by encoding a word.

        Raises:
            UserError: truncate_dim exceeds the dimension.
        """
        size, cut = self.spec.batch_size, self.spec.truncate_dim
        self.tokens = Batch(_TOKENS_PER_BATCH[self.device] if size is None else size * min(self.limit, USUAL_LIMIT))
        if full is not None and cut is not None and cut > full:
            raise UserError(f"truncate_dim = {cut}: the model's vectors have {full} dimensions")
        self.dim = cut or full or self.forward(["a"]).shape[1]

    @abstractmethod
    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        """Return (n, dim) float32 vectors of n texts, given without the prompt, on the device, in one forward pass."""

    def input_of(self, item: Mapping[str, Any]) -> str | tuple[str, ...] | None:
        """Return the item's text, made of the spec's fields, or the texts of its `reviews`."""
        if self.spec.reads_reviews:
            return tuple(text for text in map(item_text.clean, item.get("reviews") or ()) if text) or None
        return item_text.item_text(item, self.spec.fields)

    def run(self, inputs: Iterable[Any], advance: Advance = silent) -> Encoded:
        """Encode texts, or of reviews the texts of each item, whose mean is its vector; return them in input order."""
        return self._run_reviews(list(inputs), advance) if self.spec.reads_reviews else self._run(inputs, advance)

    def _run_reviews(self, items: Sequence[Sequence[str]], advance: Advance) -> Encoded:
        rows = {text: row for row, text in enumerate(dict.fromkeys(text for texts in items for text in texts))}
        encoded = self._run(rows, silent)
        known = [[rows[text] for text in texts if encoded.status[rows[text]] == OK] for texts in items]
        vectors = review_text.pooled(encoded.embedding, known, self.spec.normalise)
        errors = {row: "no review has a token that the model knows" for row in range(len(items)) if row not in vectors}
        result = collect(vectors, errors, len(items), self.dim)
        result.counts = encoded.counts | {"reviews": sum(map(len, items))}
        advance(len(items), ok=len(vectors), failed=len(errors))
        return result

    def _run(self, inputs: Iterable[str], advance: Advance) -> Encoded:
        """Encode texts, longest first, in batches with about equal numbers of tokens; return them in input order.

        Texts without any known token are failed. Counts `truncated_texts`, texts longer than the limit.
        """
        texts = list(inputs)
        try:
            return self._encoded(texts, self._lengths(texts), advance)
        finally:
            if self.token_ids is not None:
                self.token_ids.clear()

    def _encoded(self, texts: Sequence[str], lengths: np.ndarray, advance: Advance) -> Encoded:
        errors = {int(row): "the text has no token that the model knows" for row in np.flatnonzero(lengths == 0)}
        vectors: dict[int, np.ndarray] = {}
        # Longest first: running out of memory shows at the start, and there is little padding.
        order = np.argsort(-np.minimum(lengths, self.limit), kind="stable")[: len(texts) - len(errors)]
        start = 0
        arriving: deque[tuple[np.ndarray, Download]] = deque()
        while start < len(order):
            part = order[start : start + self._fitting(lengths, order, start)]
            download = self.tokens.attempt(self._started, [texts[row] for row in part])
            if download is None:
                continue
            arriving.append((part, download))
            start += len(part)
            advance(len(part), ok=len(part))
            # CUDA computes on a batch while the next one is made.
            while len(arriving) > (self.device == "cuda" and start < len(order)):
                rows, download = arriving.popleft()
                vectors.update(zip(rows.tolist(), download.wait(), strict=True))
        advance(len(errors), failed=len(errors))
        result = collect(vectors, errors, len(texts), self.dim)
        result.counts["truncated_texts"] = int((lengths > self.limit).sum())
        return result

    def _started(self, texts: Sequence[str]) -> Download:
        return Download(self.forward(texts))

    def _fitting(self, lengths: np.ndarray, order: np.ndarray, start: int) -> int:
        longest = min(int(lengths[order[start]]), self.limit)
        return max(1, self.tokens.size // max(1, longest))

    def _lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n,) token counts before truncation, special tokens included; above the limit only that they are."""
        lengths: list[int] = []
        # Texts that are too long are counted and reported by this pipeline.
        with quiet("transformers.tokenization_utils_base"):
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                prompted = [self.prompt + text for text in texts[start : start + _TEXTS_AT_ONCE]]
                lengths.extend(self.counted(prompted))
        return np.array(lengths, dtype=np.int64)

    def counted(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of tokens of n texts with their prompt; above the limit, any number above it."""
        if self.token_ids is not None:
            return self.token_ids.count(texts)
        return [len(ids) for ids in self.tokenizer(texts, truncation=False, padding=False)["input_ids"]]


def text_positions_of(model: Any) -> int | None:
    """Return the number of positions in a transformers model's config or in the text part of it; None if unlimited."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions: int | None = getattr(text, "max_position_embeddings", None)
    return None if positions is None or positions < 0 else positions


def positions_of(model: Any, max_length: int | None) -> int | None:
    """Return the number of positions of a transformers model, None if unlimited.

    Raises:
        UserError: max_length exceeds it.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    # RoBERTa and similar models number positions after the padding id.
    first = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    positions -= 0 if first is None else first + 1
    if max_length is not None and max_length > positions:
        raise UserError(f"max_length = {max_length}: the model has positions for {positions} tokens")
    return positions
