"""Texts to vectors with sentence-transformers."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from extractors.device import arithmetic, torch_dtype
from extractors.hub import checked_path
from extractors.pretrained import check_code, loaded, whole_models
from extractors.text_model import USUAL_LIMIT, TextModel, TextModelSpec


class SentenceTransformersSpec(TextModelSpec):
    """A text extractor of the sentence-transformers family."""

    backend: Literal["sentence-transformers"] = Field(description="Encode texts with a sentence-transformers model.")

    def load(self) -> "SentenceTransformersExtractor":
        """Load the model."""
        return SentenceTransformersExtractor(self)


class SentenceTransformersExtractor(TextModel):
    """A loaded sentence-transformers model."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__(spec)
        folder = checked_path(spec)
        check_code(spec, folder)
        kind = "a sentence-transformers model"
        with whole_models(kind, folder, unused=("pooler.",)):
            self.model = loaded(
                lambda: SentenceTransformer(
                    str(folder), device=self.device, local_files_only=True, trust_remote_code=spec.trust_remote_code,
                    model_kwargs={"dtype": torch_dtype(spec.precision)},
                ),
                kind, spec, folder,
            )  # fmt: skip
        if spec.max_length is not None:
            self.model.max_seq_length = spec.max_length
        self.limit = self.model.max_seq_length or USUAL_LIMIT
        self.tokenizer = self.model.tokenizer
        own = self.model.prompts.get(self.model.default_prompt_name or "") or ""
        self.prompt = own if spec.prompt is None else spec.prompt
        self.ready(self.model.get_embedding_dimension())

    def facts(self) -> dict[str, Any]:
        """Return the token limit and the prompt in use."""
        return {"max_length": self.limit, "prompt": self.prompt, "modules": [type(m).__name__ for m in self.model]}

    def forward(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, dim) float32 vectors of n texts in one forward pass."""
        with arithmetic(self.device, self.spec.precision):
            vectors = self.model.encode(
                list(texts), prompt=self.spec.prompt, batch_size=len(texts), show_progress_bar=False,
                normalize_embeddings=self.spec.normalise, truncate_dim=self.spec.truncate_dim, convert_to_tensor=True,
            )  # fmt: skip
        return vectors.float().cpu().numpy()
