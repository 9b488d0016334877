"""Models of sentence-transformers: settings of all of them, and the encoder of texts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cm3.common.errors import UserError
from extractors.caption.prompt import read_prompted, without_control_tokens
from extractors.extractor import Extractor
from extractors.runtime.imports import without_collection
from extractors.runtime.precision import arithmetic, torch_dtype
from extractors.runtime.slabs import upload
from extractors.runtime.source import Source
from extractors.spec import Cost
from extractors.text.base import (
    NO_LIMIT,
    UNSET_LIMIT,
    USUAL_LIMIT,
    TextModel,
    TextModelSpec,
    positions_of,
    text_positions_of,
)
from extractors.text.item_text import item_text
from extractors.text.sentence_inputs import SentenceInputs, own_inputs
from extractors.text.tokens import TokenIds
from extractors.weights.completeness import check_checkpoint
from extractors.weights.hub import checked_path, quiet, without_bars
from extractors.weights.pretrained import check_code, loaded

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

KIND = "a sentence-transformers model"
_IMAGES_PER_SHARD = 512


class SentenceTransformersSpec(TextModelSpec):
    """A model of sentence-transformers: of texts, of images, or of images together with texts."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("sentence-transformers", "torch", "transformers", "tokenizers")
    cost: ClassVar[Cost] = Cost(2500, 1500, 30)
    modalities: ClassVar[tuple[str, ...]] = ("text", "reviews", "image", "multimodal")

    modality: Literal["text", "reviews", "image", "multimodal"] = Field(
        description="Input: text, the reviews in the training split, image, or image and text together (multimodal)."
    )
    backend: Literal["sentence-transformers"] = Field(
        description="Encode texts, images or both with a sentence-transformers model."
    )
    max_pixels: int | None = Field(
        None, ge=784, description="Maximum area of an image in pixels; default: that of the model's own preprocessing."
    )
    min_pixels: int | None = Field(
        None, gt=0, description="Minimum area of an image in pixels; default: that of the model's own preprocessing."
    )

    @model_validator(mode="after")
    def _settings_of_the_modality(self) -> "SentenceTransformersSpec":
        if self._reads_text:
            for name in ("max_pixels", "min_pixels"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for images, but modality is {self.modality}; remove it")
        elif self.max_length is not None:
            raise ValueError(f"max_length is for texts, but modality is {self.modality}; remove it")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels = {self.min_pixels} exceeds max_pixels = {self.max_pixels}")
        return self

    def needs(self) -> set[str]:
        """Return items, and the manifest where images are read."""
        return super().needs() if self._reads_text else {"items", "manifest"}

    @property
    def _reads_text(self) -> bool:
        return self.modality in ("text", "reviews")

    def items_per_shard(self) -> int | None:
        """Return the number of items per shard: fewer images than texts."""
        return super().items_per_shard() if self._reads_text else self.shard_size or _IMAGES_PER_SHARD

    def text_of(self, item: Mapping[str, Any]) -> str:
        """Return the text that goes with an item's image: none for modality image."""
        # A title may contain the placeholder of an image.
        return "" if self.modality == "image" else without_control_tokens(item_text(item, self.fields) or "")

    def read(self, inputs: Mapping[str, Path]) -> Source[Any]:
        """Return the texts, the images, or the images with their texts."""
        return super().read(inputs) if self._reads_text else read_prompted(inputs, self.text_of)

    def load(self) -> Extractor[Any]:
        """Load the model."""
        if self._reads_text:
            return SentenceTransformersExtractor(self)
        from extractors.multimodal.sentence_transformers import SentenceTransformersImages

        return SentenceTransformersImages(self)


def library_model(spec: SentenceTransformersSpec, device: str) -> "SentenceTransformer":
    """Return a model of the library with every weight from its checkpoint.

    Raises:
        UserError: the folder is not such a model, weights are missing, or loading would run code that is not trusted.
    """
    with without_collection():
        from sentence_transformers import SentenceTransformer
        from transformers import PreTrainedModel

    folder = checked_path(spec)
    check_code(spec, folder)
    without_bars()
    with quiet("transformers"):
        model = loaded(
            lambda: SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                trust_remote_code=spec.trust_remote_code,
                model_kwargs={"dtype": torch_dtype(spec.precision), "ignore_mismatched_sizes": True},
            ),
            KIND,
            spec,
            folder,
        )
        # The library does not report missing weights.
        bodies = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        inner = {id(part) for body in bodies for part in body.modules() if part is not body}
        outermost = [body for body in bodies if id(body) not in inner]
        loaded(lambda: check_checkpoint(outermost, KIND, folder, unused=("pooler.",)), KIND, spec, folder)
    return model.eval()


def prompt_of(model: "SentenceTransformer", spec: SentenceTransformersSpec) -> str:
    """Return the text before each input: the spec's prompt, else the model's own default prompt."""
    own = model.prompts.get(model.default_prompt_name or "") or ""
    return own if spec.prompt is None else spec.prompt


def library_order(sizes: Sequence[int]) -> np.ndarray:
    """Return the order in which the library's `encode` puts inputs into a batch: by characters and pixels.

    The place of an input in its batch may change the last digit of its vector.
    """
    return np.argsort([-size for size in sizes])


def library_vectors(
    model: "SentenceTransformer", inputs: dict[str, Any], spec: SentenceTransformersSpec
) -> "torch.Tensor":
    """Return (n, d) float32 vectors of a batch, as the library's `encode` does.

    Args:
        model: a loaded model.
        inputs: result of the model's `preprocess`, on any device.
        spec: precision, normalise and truncate_dim.
    """
    import torch

    device = model.device
    with torch.inference_mode(), arithmetic(device.type, spec.precision):
        on_device = {
            name: upload(value, device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        cut = model.truncate_dim if spec.truncate_dim is None else spec.truncate_dim
        vectors: torch.Tensor = model(on_device)["sentence_embedding"][:, :cut]
        return (torch.nn.functional.normalize(vectors, dim=1) if spec.normalise else vectors).float()


class SentenceTransformersExtractor(TextModel):
    """A loaded sentence-transformers model that encodes texts."""

    spec: SentenceTransformersSpec

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        super().__init__(spec)
        self.model = library_model(spec, self.device)
        # The library opens a text that looks like the address or the path of an image, unless it is marked as a text.
        self.marks_texts = any(modality != "text" for modality in self.model.modalities)
        self.limit = self._token_limit()
        self.tokenizer = self.model.tokenizer
        self.prompt = prompt_of(self.model, spec)
        self.inputs = self._own_inputs()
        self.token_ids = None if self.inputs is None else self.inputs.token_ids
        self.ready(self.model.get_embedding_dimension())

    def facts(self) -> dict[str, Any]:
        """Return token limit, prompt and modules."""
        limit = None if self.limit == NO_LIMIT else self.limit
        return {"max_length": limit, "prompt": self.prompt, "modules": [type(m).__name__ for m in self.model]}

    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        """Return (n, dim) float32 vectors of n texts on the device, in one forward pass."""
        import torch

        order = library_order([len(text) for text in texts])
        inputs = self._inputs_of([texts[row] for row in order])
        back = upload(torch.from_numpy(np.argsort(order)), self.model.device)
        return library_vectors(self.model, inputs, self.spec)[back]

    def _inputs_of(self, texts: Sequence[str]) -> dict[str, Any]:
        if self.inputs is not None:
            return self.inputs.of(texts)
        return dict(self.model.preprocess(self._marked(texts), prompt=self.prompt))

    def _own_inputs(self) -> SentenceInputs | None:
        """Return inputs of kept tokens; None if the library's are different, so that it tokenises a second time."""
        if not callable(self.tokenizer):
            return None
        with quiet("transformers.tokenization_utils_base"):
            return own_inputs(self.model, TokenIds(self.tokenizer, self.limit), self.prompt, self._marked)

    def _marked(self, texts: Sequence[str]) -> list[Any]:
        return [{"text": text} for text in texts] if self.marks_texts else list(texts)

    def counted(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of tokens of n texts with their prompt; above the limit, any number above it."""
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
        if asked is None and own is not None and own >= UNSET_LIMIT:
            body = self.model.transformers_model
            asked = (text_positions_of(body) if body is not None else None) or USUAL_LIMIT
        if asked is not None:
            self.model.max_seq_length = asked
        return asked or own or USUAL_LIMIT
