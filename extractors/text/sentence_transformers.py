"""Text encoders of sentence-transformers."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cm3.common.errors import UserError
from extractors.runtime.precision import arithmetic, torch_dtype
from extractors.spec import Cost
from extractors.text.base import NO_LIMIT, USUAL_LIMIT, TextModel, TextModelSpec, positions_of
from extractors.weights.completeness import check_checkpoint
from extractors.weights.hub import checked_path, quiet, without_bars
from extractors.weights.pretrained import check_code, loaded


class SentenceTransformersSpec(TextModelSpec):
    """A model of sentence-transformers."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("sentence-transformers", "torch", "transformers", "tokenizers")
    cost: ClassVar[Cost] = Cost(2500, 1500, 30)

    backend: Literal["sentence-transformers"] = Field(description="Encode texts with a sentence-transformers model.")

    def load(self) -> "SentenceTransformersExtractor":
        """Load the model."""
        return SentenceTransformersExtractor(self)


class SentenceTransformersExtractor(TextModel):
    """A loaded sentence-transformers model."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers import PreTrainedModel

        super().__init__(spec)
        folder = checked_path(spec)
        check_code(spec, folder)
        kind = "a sentence-transformers model"
        without_bars()
        with quiet("transformers"):
            self.model = loaded(
                lambda: SentenceTransformer(
                    str(folder),
                    device=self.device,
                    local_files_only=True,
                    trust_remote_code=spec.trust_remote_code,
                    model_kwargs={"dtype": torch_dtype(spec.precision), "ignore_mismatched_sizes": True},
                ),
                kind,
                spec,
                folder,
            )
            # The library does not report missing weights.
            bodies = [part for part in self.model.modules() if isinstance(part, PreTrainedModel)]
            inner = {id(part) for body in bodies for part in body.modules() if part is not body}
            outermost = [body for body in bodies if id(body) not in inner]
            loaded(lambda: check_checkpoint(outermost, kind, folder, unused=("pooler.",)), kind, spec, folder)
        self.limit = self._token_limit()
        self.tokenizer = self.model.tokenizer
        own = self.model.prompts.get(self.model.default_prompt_name or "") or ""
        self.prompt = own if spec.prompt is None else spec.prompt
        self.ready(self.model.get_embedding_dimension())

    def facts(self) -> dict[str, Any]:
        """Return token limit, prompt and modules."""
        limit = None if self.limit == NO_LIMIT else self.limit
        return {"max_length": limit, "prompt": self.prompt, "modules": [type(m).__name__ for m in self.model]}

    def forward(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, dim) float32 vectors of n texts in one forward pass."""
        with arithmetic(self.device, self.spec.precision):
            vectors = self.model.encode(
                list(texts),
                prompt=self.spec.prompt,
                batch_size=len(texts),
                show_progress_bar=False,
                normalize_embeddings=self.spec.normalise,
                truncate_dim=self.spec.truncate_dim,
                convert_to_tensor=True,
            )
        return vectors.float().cpu().numpy()

    def counted(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of tokens of n texts without truncation."""
        if callable(self.tokenizer):
            return super().counted(texts)
        # Static embeddings have a tokenizer of another library, and no special tokens.
        return [len(one.ids) for one in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _token_limit(self) -> int:
        """Return the token limit, after applying max_length to the model."""
        asked, own = self.spec.max_length, self.model.max_seq_length
        if own == math.inf:
            if asked is not None:
                raise UserError(f"max_length = {asked}: the model has no limit; leave it out")
            return NO_LIMIT
        if self.model.transformers_model is not None:
            positions_of(self.model.transformers_model, asked)
        if asked is not None:
            self.model.max_seq_length = asked
        return asked or own or USUAL_LIMIT
