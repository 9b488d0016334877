"""Base of image encoders: decoding and preprocessing in threads, forward passes in batches."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from cm3.common.device import select_device
from cm3.common.image_decode import UnreadableError, decode
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.image.item_images import image_of, read_images
from extractors.runtime.batch import Batch
from extractors.runtime.precision import arithmetic
from extractors.runtime.prefetch import chunks, default_workers, map_ahead
from extractors.runtime.source import Source
from extractors.weights.spec import ModelSpec

if TYPE_CHECKING:
    import torch

# On a CPU the activations of a few images fit into its cache; batches of 16 are slower by a third.
_IMAGES_PER_BATCH = {"cpu": 4, "mps": 64, "cuda": 256}


class ImageModelSpec(ModelSpec):
    """A spec of an image encoder."""

    modalities: ClassVar[tuple[str, ...]] = ("image",)

    modality: Literal["image"] = Field(description="Always image.")
    normalise: bool = Field(False, description="Scale vectors to unit length.")

    def needs(self) -> set[str]:
        """Return items and manifest."""
        return {"items", "manifest"}

    def read(self, inputs: Mapping[str, Path]) -> Source[bytes]:
        """Return the images of the manifest."""
        return read_images(inputs["items"], inputs["manifest"])


class ArchitectureSpec(ImageModelSpec):
    """A spec of an image encoder whose `model` names an architecture; its weights come from a hub or a local file."""

    hub_field: ClassVar[str] = "hub"

    model: str | None = Field(None, description="Name of the architecture, or a local path, equivalent to weights.")
    hub: str | None = Field(None, description="Hub repository (owner/name) of the weights.")


class ImageModel(Extractor[bytes]):
    """A loaded image encoder. Subclasses set `model` and `dim` and implement `prepare` and `forward`."""

    def __init__(self, spec: ImageModelSpec) -> None:
        self.spec = spec
        self.device = select_device(spec.device, "device").type
        self.batch = Batch(spec.batch_size or _IMAGES_PER_BATCH[self.device])
        # On a CPU prefetching would compete with the forward pass for cores; on a GPU it runs in parallel to it.
        self.lookahead = 0 if self.device == "cpu" else 3

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """Return an RGB image as a tensor, or as tensors by name; `forward` gets stacks of them. Runs in threads."""

    @abstractmethod
    def forward(self, stack: Any) -> "torch.Tensor":
        """Return (n, d) vectors of n prepared images, stacked on the device."""

    def measured_dim(self) -> int:
        """Return d, measured by encoding a white image."""
        return int(self._encode([self.prepare(Image.new("RGB", (64, 64), "white"))]).shape[1])

    def input_of(self, item: Mapping[str, Any]) -> bytes | None:
        """Return the bytes of the item's image."""
        return image_of(item)

    def run(self, inputs: Iterable[bytes], advance: Advance = silent) -> Encoded:
        """Encode images; those that cannot be decoded are failed, with the reason."""
        vectors: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        first = 0
        with ThreadPoolExecutor(max(1, default_workers(self.spec.workers))) as pool:
            groups = chunks(inputs, lambda: self.batch.size)
            for prepared in map_ahead(pool, self._decoded, groups, self.lookahead):
                good = [(first + i, one) for i, one in enumerate(prepared) if not isinstance(one, str)]
                errors.update({first + i: one for i, one in enumerate(prepared) if isinstance(one, str)})
                rows = [row for row, _ in good]
                vectors.update(zip(rows, self.batch.all(self._encode, [one for _, one in good]), strict=True))
                first += len(prepared)
                advance(len(prepared), ok=len(good), failed=len(prepared) - len(good))
        return collect(vectors, errors, first, self.dim)

    def _decoded(self, data: bytes) -> Any:
        try:
            return self.prepare(decode(data))
        except UnreadableError as reason:
            return str(reason)

    def _encode(self, prepared: Sequence[Any]) -> np.ndarray:
        import torch

        with torch.inference_mode(), arithmetic(self.device, self.spec.precision):
            if isinstance(prepared[0], dict):
                stack: Any = {name: self._stacked([one[name] for one in prepared]) for name in prepared[0]}
            else:
                stack = self._stacked(prepared)
            vectors = self.forward(stack).float()
            if self.spec.normalise:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return vectors.cpu().numpy()

    def _stacked(self, tensors: Sequence["torch.Tensor"]) -> "torch.Tensor":
        import torch

        stack = torch.stack(list(tensors))
        if self.device == "cuda":
            stack = stack.pin_memory().to(self.device, non_blocking=True)
        return stack.to(self.device)
