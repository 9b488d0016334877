"""Image and joint image-text embeddings of sentence-transformers."""

import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

from cm3.common.device import select_device
from cm3.common.errors import UserError
from extractors.caption.base import MAX_ASPECT
from extractors.caption.batches import Asked, image_batch
from extractors.caption.prompt import Prompted
from extractors.image.item_images import image_of
from extractors.multimodal.base import ImageTextModel
from extractors.runtime.slabs import pinned_for
from extractors.text.sentence_transformers import (
    KIND,
    SentenceTransformersSpec,
    library_model,
    library_order,
    library_vectors,
    prompt_of,
)
from extractors.weights.hub import model_path
from extractors.weights.pretrained import loaded

_MOST_IMAGES = 128
"""Two batches of decoded images are in memory at a time, and without max_pixels an image may have any size."""


class SentenceTransformersImages(ImageTextModel):
    """A loaded sentence-transformers model that encodes images, or images together with texts."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        self.spec = spec
        self.device = select_device(spec.device, "device").type
        self.model = library_model(spec, self.device)
        folder = model_path(spec)
        if not self.model.supports("image" if spec.modality == "image" else ("image", "text")):
            modalities = ", ".join(str(one) for one in self.model.modalities)
            raise UserError(f"{folder}: does not encode inputs of modality {spec.modality}, only {modalities}")
        self.batch = image_batch(spec.batch_size, self.device, _MOST_IMAGES)
        # A tokenizer is not safe for two threads: after memory ran out, a batch is made anew while the next one is made.
        self.tokenizing = threading.Lock()
        self.prompt = prompt_of(self.model, spec)
        white = (Image.new("RGB", (64, 64), "white"), "" if spec.modality == "image" else "a")
        self.dim = loaded(lambda: self.vectors([white]).shape[1], KIND, spec, folder)
        if spec.truncate_dim is not None and spec.truncate_dim > self.dim:
            raise UserError(f"truncate_dim = {spec.truncate_dim}: the model's vectors have {self.dim} dimensions")

    def facts(self) -> dict[str, Any]:
        """Return prompt, modules and preprocessing."""
        limits = {"max_pixels": self.spec.max_pixels, "min_pixels": self.spec.min_pixels, "max_aspect": MAX_ASPECT}
        return {
            "prompt": self.prompt,
            "modules": [type(module).__name__ for module in self.model],
            "preprocessing": {name: value for name, value in limits.items() if value is not None}
            | {"processor": type(self.model.processor).__name__, "library": "sentence-transformers"}
            | {name: metadata.version(name) for name in ("pillow", "torchvision")},
        }

    def input_of(self, item: Mapping[str, Any]) -> Prompted | None:
        """Return the item's image with its text; None without an image."""
        image = image_of(item)
        return None if image is None else Prompted(image, self.spec.text_of(item))

    def features_of(self, asked: Sequence[Asked]) -> list[tuple[list[int], dict[str, Any]]]:
        """Return rows and inputs of the images with a text and of those without one."""
        found = []
        with self.tokenizing:
            for with_text in (True, False):  # a batch of the library has inputs of one kind
                rows = [row for row, (_, text) in enumerate(asked) if bool(text) == with_text]
                rows = [rows[place] for place in library_order([_size(asked[row]) for row in rows])]
                if rows:
                    given = [_given(*asked[row]) for row in rows]
                    inputs = self.model.preprocess(given, prompt=self.prompt)
                    found.append((rows, {name: self._pinned(value) for name, value in inputs.items()}))
        return found

    def vectors(self, asked: Sequence[Asked], features: Any = None) -> np.ndarray:
        """Return (n, dim) float32 vectors of n images with their texts; an empty text is left out."""
        parts = self.features_of(asked) if features is None else features
        found: dict[int, np.ndarray] = {}
        for rows, inputs in parts:
            found.update(zip(rows, library_vectors(self.model, inputs, self.spec).cpu().numpy(), strict=True))
        return np.stack([found[row] for row in range(len(asked))])

    def _pinned(self, value: Any) -> Any:
        import torch

        return pinned_for(self.model.device, value) if isinstance(value, torch.Tensor) else value


def _given(image: Image.Image, text: str) -> dict[str, Any]:
    return {"image": image} | ({"text": text} if text else {})


def _size(one: Asked) -> int:
    image, text = one
    return image.width * image.height + len(text)
