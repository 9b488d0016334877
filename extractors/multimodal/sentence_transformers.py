"""Image and joint image-text embeddings of sentence-transformers."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

from cm3.common.device import select_device
from cm3.common.errors import UserError
from extractors.caption.base import MAX_ASPECT, load_image
from extractors.caption.local import image_batch
from extractors.caption.prompt import Prompted
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.image.item_images import image_of
from extractors.runtime.precision import arithmetic
from extractors.runtime.prefetch import chunks
from extractors.text.sentence_transformers import KIND, SentenceTransformersSpec, library_model
from extractors.weights.hub import model_path
from extractors.weights.pretrained import loaded


class SentenceTransformersImages(Extractor[Prompted]):
    """A loaded sentence-transformers model that encodes images, or images together with texts."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        self.spec = spec
        self.device = select_device(spec.device, "device").type
        self.model = library_model(spec, self.device)
        folder = model_path(spec)
        if not self.model.supports("image" if spec.modality == "image" else ("image", "text")):
            modalities = ", ".join(str(one) for one in self.model.modalities)
            raise UserError(f"{folder}: does not encode inputs of modality {spec.modality}, only {modalities}")
        self.batch = image_batch(spec.batch_size, self.device)
        white = (Image.new("RGB", (64, 64), "white"), "" if spec.modality == "image" else "a")
        self.dim = loaded(lambda: self._encode([white]).shape[1], KIND, spec, folder)
        if spec.truncate_dim is not None and spec.truncate_dim > self.dim:
            raise UserError(f"truncate_dim = {spec.truncate_dim}: the model's vectors have {self.dim} dimensions")

    def facts(self) -> dict[str, Any]:
        """Return prompt, modules and preprocessing."""
        own = self.model.prompts.get(self.model.default_prompt_name or "") or ""
        limits = {"max_pixels": self.spec.max_pixels, "min_pixels": self.spec.min_pixels, "max_aspect": MAX_ASPECT}
        return {
            "prompt": own if self.spec.prompt is None else self.spec.prompt,
            "modules": [type(module).__name__ for module in self.model],
            "preprocessing": {name: value for name, value in limits.items() if value is not None}
            | {"processor": type(self.model.processor).__name__, "library": "sentence-transformers"}
            | {name: metadata.version(name) for name in ("pillow", "torchvision")},
        }

    def input_of(self, item: Mapping[str, Any]) -> Prompted | None:
        """Return the item's image with its text; None without an image."""
        image = image_of(item)
        return None if image is None else Prompted(image, self.spec.text_of(item))

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Encoded:
        """Encode images with their texts; images that cannot be decoded are failed, with the reason."""
        vectors: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        first = 0
        for group in chunks(inputs, lambda: self.batch.size):
            decoded: dict[int, tuple[Image.Image, str]] = {}
            for row, one in enumerate(group, first):
                image = load_image(one.image, self.spec.max_pixels or sys.maxsize, self.spec.min_pixels)
                if isinstance(image, str):
                    errors[row] = image
                else:
                    decoded[row] = image, one.prompt
            vectors.update(zip(decoded, self.batch.all(self._encode, list(decoded.values())), strict=True))
            first += len(group)
            advance(len(group), ok=len(decoded), failed=len(group) - len(decoded))
        return collect(vectors, errors, first, self.dim)

    def _encode(self, decoded: Sequence[tuple[Image.Image, str]]) -> np.ndarray:
        """Return (n, dim) float32 vectors of n images with their texts; an empty text is left out."""
        vectors: dict[int, np.ndarray] = {}
        for with_text in (True, False):  # a batch of the library has inputs of one kind
            rows = [row for row, (_, text) in enumerate(decoded) if bool(text) == with_text]
            given = [
                {"image": image} | ({"text": text} if text else {}) for image, text in (decoded[row] for row in rows)
            ]
            if given:
                vectors.update(zip(rows, self._vectors(given), strict=True))
        return np.stack([vectors[row] for row in range(len(decoded))])

    def _vectors(self, given: list[dict[str, Any]]) -> np.ndarray:
        with arithmetic(self.device, self.spec.precision):
            vectors = self.model.encode(
                given,
                prompt=self.spec.prompt,
                batch_size=len(given),
                show_progress_bar=False,
                normalize_embeddings=self.spec.normalise,
                truncate_dim=self.spec.truncate_dim,
                convert_to_tensor=True,
            )
        found: np.ndarray = vectors.float().cpu().numpy()
        return found
