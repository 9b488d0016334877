"""Text encoders of transformers: pooled last hidden states."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cm3.common.errors import UserError
from extractors.extractor import Advance, Encoded, silent
from extractors.runtime.precision import arithmetic
from extractors.spec import Cost
from extractors.text.base import USUAL_LIMIT, TextModel, TextModelSpec, positions_of
from extractors.text.pooling import TokenPooling, pool
from extractors.weights.hub import checked_path, quiet
from extractors.weights.pretrained import load_model, load_part, loaded, on_device

if TYPE_CHECKING:
    import torch

_UNSET = 1_000_000
"""Tokenizers without a limit report a larger one."""


class TransformersTextSpec(TextModelSpec):
    """Any text encoder or decoder of transformers."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    cost: ClassVar[Cost] = Cost(2500, 4000, 10)

    modality: Literal["text", "reviews"] = Field(description="Input: text, or the reviews in the training split.")
    backend: Literal["transformers-text"] = Field(description="Pool the last hidden states of a transformers model.")
    pooling: TokenPooling = Field(
        "mean",
        description="Pooling of the last hidden states: mean, first token (cls), last token, or maximum per dimension.",
    )
    prompt: str | None = Field(None, description="Text before each item text.")

    def load(self) -> "TransformersTextExtractor":
        """Load the model."""
        return TransformersTextExtractor(self)


class TransformersTextExtractor(TextModel):
    """A loaded transformers model; of an encoder-decoder model, the encoder."""

    spec: TransformersTextSpec

    def __init__(self, spec: TransformersTextSpec) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(spec)
        self._ids: dict[str, np.ndarray] = {}
        folder = checked_path(spec)
        self.tokenizer = load_part(AutoTokenizer, spec, folder, "a text model with a tokenizer")
        self._padded_right(folder)
        # The pooling head is not used, and many checkpoints lack it.
        model = load_model(AutoModel, spec, folder, "a text encoder", unused=("pooler.",))
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        model.config.use_cache = False  # a decoder would keep the keys and values of all layers
        kind = f"a text encoder ({type(model).__name__})"
        self.model = on_device(model, self.device, kind, spec, folder)
        self.prompt = spec.prompt or ""
        self.limit = self._token_limit()
        self.ready(loaded(lambda: self._states(["a"])[0].shape[-1], kind, spec, folder))

    def run(self, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        """Encode texts as `TextModel.run` does; each is tokenised once, for its length and its vector."""
        try:
            return super().run(inputs, advance)
        finally:
            self._ids.clear()

    def counted(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of tokens of n texts without truncation; keep the tokens of those within the limit."""
        found = self.tokenizer(list(texts), truncation=False, padding=False)["input_ids"]
        self._ids |= {
            text: np.asarray(ids, np.int32) for text, ids in zip(texts, found, strict=True) if len(ids) <= self.limit
        }
        return [len(ids) for ids in found]

    def facts(self) -> dict[str, Any]:
        """Return architecture, pooling, token limit and prompt."""
        return {
            "model": type(self.model).__name__,
            "pooling": self.spec.pooling,
            "max_length": self.limit,
            "prompt": self.prompt,
        }

    def forward(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, dim) float32 vectors of n texts in one forward pass."""
        import torch

        states, mask = self._states(texts)
        vectors = pool(states.float(), mask, self.spec.pooling)[:, : self.spec.truncate_dim]
        if self.spec.normalise:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu().numpy()

    def _states(self, texts: Sequence[str]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return (n, tokens, width) last hidden states and the (n, tokens) attention mask."""
        import torch

        with quiet("transformers.tokenization_utils_base"):  # it advises against padding apart from tokenising
            batch = self.tokenizer.pad(
                {"input_ids": self._tokens_of([self.prompt + text for text in texts])},
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            ).to(self.device)
        with torch.inference_mode(), arithmetic(self.device, self.spec.precision):
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.last_hidden_state, batch["attention_mask"]

    def _tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of n texts with their prompt, truncated to the limit."""
        new = [text for text in texts if text not in self._ids]
        found = self.tokenizer(new, truncation=True, max_length=self.limit)["input_ids"] if new else []
        tokenised = dict(zip(new, found, strict=True))
        return [self._ids[text].tolist() if text in self._ids else tokenised[text] for text in texts]

    def _padded_right(self, folder: Path) -> None:
        """Let the tokenizer pad on the right, so that positions start at 0 and a decoder sees no padding."""
        tokenizer = self.tokenizer
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            # The mask hides padding, so any token can be used.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(f"{folder}: its tokenizer has no padding token; set pad_token in tokenizer_config.json")

    def _token_limit(self) -> int:
        """Return the token limit: max_length, else that of tokenizer and positions."""
        positions = positions_of(self.model, self.spec.max_length)
        if self.spec.max_length is not None:
            return self.spec.max_length
        named = [limit for limit in (self.tokenizer.model_max_length, positions) if limit and limit < _UNSET]
        return min(named, default=USUAL_LIMIT)
