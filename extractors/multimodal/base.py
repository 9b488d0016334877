"""Base of encoders of images with texts: batches of decoded images; on a GPU the next batch is prepared meanwhile."""

import sys
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from extractors.caption.base import load_image
from extractors.caption.batches import Asked, prepared_batches
from extractors.caption.prompt import Prompted
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.runtime.batch import Batch


class ImageTextModel(Extractor[Prompted]):
    """A loaded encoder of images with texts. Subclasses set its attributes and implement `features_of` and `vectors`.

    Attributes:
        spec: settings, with max_pixels (None: no limit), min_pixels and workers.
        batch: the batch size.
    """

    spec: Any
    batch: Batch

    @abstractmethod
    def features_of(self, asked: Sequence[Asked]) -> Any:
        """Return the model's inputs for images and texts, on the host. On a GPU it runs in a thread."""

    @abstractmethod
    def vectors(self, asked: Sequence[Asked], features: Any = None) -> np.ndarray:
        """Return (n, dim) float32 vectors of n images with their texts, in one batch.

        Args:
            asked: images and texts.
            features: the result of `features_of`, if it was prepared.
        """

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Encoded:
        """Encode images with their texts; images that cannot be decoded are failed, with the reason."""
        vectors: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        first = 0
        for batch in prepared_batches(
            inputs, lambda: self.batch.size, self._decoded, self.features_of, self.device, self.spec.workers
        ):
            failed = {row: one for row, one in enumerate(batch.images, first) if isinstance(one, str)}
            rows = [row for row in range(first, first + len(batch.images)) if row not in failed]
            vectors.update(zip(rows, batch.outputs(self.batch, self.vectors), strict=True))
            errors |= failed
            first += len(batch.images)
            advance(len(batch.images), ok=len(rows), failed=len(failed))
        return collect(vectors, errors, first, self.dim)

    def _decoded(self, data: bytes) -> Image.Image | str:
        return load_image(data, self.spec.max_pixels or sys.maxsize, self.spec.min_pixels)
