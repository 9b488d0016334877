"""Token ids of texts: each text is tokenised once, for its length and for its vector, and batches are padded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class TokenIds:
    """Token ids of texts by a tokenizer of transformers; those of counted texts are kept until `clear`.

    Attributes:
        tokenizer: called with lists of texts.
        limit: maximum number of tokens, special tokens included; longer texts are truncated.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self._kept: dict[str, np.ndarray] = {}

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, limit + 1 for longer texts; keep the tokens."""
        tokenised = self.tokenizer(list(texts), truncation=True, max_length=self.limit, padding=False)
        found = tokenised["input_ids"]
        self._kept |= {text: np.asarray(ids, np.int32) for text, ids in zip(texts, found, strict=True)}
        # Tokenizers written in Python do not report whether they have truncated a text.
        encodings = tokenised.encodings or [None] * len(found)
        return [
            len(ids) + (len(ids) >= self.limit and self._is_truncated(text, encoding))
            for text, ids, encoding in zip(texts, found, encodings, strict=True)
        ]

    def _is_truncated(self, text: str, encoding: Any) -> bool:
        if encoding is not None:
            return bool(encoding.overflowing)
        return len(self.tokenizer([text], truncation=False, padding=False)["input_ids"][0]) > self.limit

    def batch(self, texts: Sequence[str]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return (n, tokens) token ids of n texts and their mask, int64, padded on the tokenizer's side."""
        import torch

        new = [text for text in texts if text not in self._kept]
        found = self.tokenizer(new, truncation=True, max_length=self.limit, padding=False)["input_ids"] if new else []
        tokenised = dict(zip(new, found, strict=True))
        rows = [self._kept[text] if text in self._kept else tokenised[text] for text in texts]
        # Not the tokenizer's own `pad`, which takes as long as tokenising.
        lengths = np.array([len(row) for row in rows])[:, None]
        columns, longest = np.arange(lengths.max()), lengths.max()
        mask = columns < lengths if self.tokenizer.padding_side == "right" else columns >= longest - lengths
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int64)
        ids[mask] = np.concatenate(rows)
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def clear(self) -> None:
        """Forget the tokens of counted texts."""
        self._kept.clear()
