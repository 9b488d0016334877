"""Text encoders of transformers: pooled last hidden states."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cm3.common.errors import UserError
from extractors.runtime.precision import arithmetic
from extractors.runtime.slabs import upload
from extractors.spec import Cost
from extractors.text.base import USUAL_LIMIT, TextModel, TextModelSpec, positions_of
from extractors.text.pooling import TokenPooling, pool
from extractors.text.tokens import TokenIds
from extractors.weights.hub import checked_path
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
    token_ids: TokenIds

    def __init__(self, spec: TransformersTextSpec) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(spec)
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
        self.token_ids = TokenIds(self.tokenizer, self.limit)
        self.ready(loaded(lambda: self._states(["a"])[0].shape[-1], kind, spec, folder))

    def facts(self) -> dict[str, Any]:
        """Return architecture, pooling, token limit and prompt."""
        return {
            "model": type(self.model).__name__,
            "pooling": self.spec.pooling,
            "max_length": self.limit,
            "prompt": self.prompt,
        }

    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        """Return (n, dim) float32 vectors of n texts on the device, in one forward pass."""
        import torch

        states, mask = self._states(texts)
        vectors = pool(states.float(), mask, self.spec.pooling)[:, : self.spec.truncate_dim]
        return torch.nn.functional.normalize(vectors, dim=-1) if self.spec.normalise else vectors

    def _states(self, texts: Sequence[str]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return (n, tokens, width) last hidden states and the (n, tokens) attention mask."""
        import torch

        ids, mask = (
            upload(one, self.model.device) for one in self.token_ids.batch([self.prompt + text for text in texts])
        )
        with torch.inference_mode(), arithmetic(self.device, self.spec.precision):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask

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
