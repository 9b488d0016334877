"""Base of image encoders: decoding and preprocessing in threads, forward passes in batches."""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
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
from extractors.runtime.slabs import Download, Slab
from extractors.runtime.source import Source
from extractors.weights.spec import ModelSpec

if TYPE_CHECKING:
    import torch

# On a CPU the activations of a few images fit into its cache; batches of 16 are slower by a third.
_IMAGES_PER_BATCH = {"cpu": 4, "mps": 64, "cuda": 256}
_FILLING = 2
"""Slabs that are filled while the device computes on another one."""


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
    """A loaded image encoder. Subclasses set `model` and `dim` and implement `prepare` and `forward`.

    Attributes:
        uses_slabs: threads write prepared images into reused host buffers, and the device normalises them: on CUDA.
    """

    def __init__(self, spec: ImageModelSpec) -> None:
        self.spec = spec
        self.device = select_device(spec.device, "device").type
        self.batch = Batch(spec.batch_size or _IMAGES_PER_BATCH[self.device])
        # On a CPU prefetching would compete with the forward pass for cores; on a GPU it runs in parallel to it.
        self.lookahead = 0 if self.device == "cpu" else 3
        self.uses_slabs = self.device == "cuda"

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """Return an RGB image as a tensor, or as tensors by name; `forward` gets stacks of them. Runs in threads."""

    @abstractmethod
    def forward(self, stack: Any) -> "torch.Tensor":
        """Return (n, d) vectors of n prepared images, stacked on the device."""

    def pixels(self, image: Image.Image) -> Any:
        """Return an RGB image as uint8 tensor, from which `normalised` makes the tensor of `prepare`; else that tensor."""
        return self.prepare(image)

    def normalised(self, stack: Any) -> Any:
        """Return what `prepare` returns, of a stack of `pixels`, on its device."""
        return stack

    def measured_dim(self) -> int:
        """Return d, measured by encoding a white image."""
        return int(self._encode([self.prepare(Image.new("RGB", (64, 64), "white"))]).shape[1])

    def input_of(self, item: Mapping[str, Any]) -> bytes | None:
        """Return the bytes of the item's image."""
        return image_of(item)

    def run(self, inputs: Iterable[bytes], advance: Advance = silent) -> Encoded:
        """Encode images; those that cannot be decoded are failed, with the reason."""
        if self.uses_slabs:
            return SlabRun(self).encode(inputs, advance)
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
            return self.vectors_of(stack).cpu().numpy()

    def vectors_of(self, stack: Any) -> "torch.Tensor":
        """Return (n, d) float32 vectors of n prepared images, on the device; of unit length where the spec says so."""
        import torch

        vectors = self.forward(stack).float()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.spec.normalise else vectors

    def _stacked(self, tensors: Sequence["torch.Tensor"]) -> "torch.Tensor":
        import torch

        return torch.stack(list(tensors)).to(self.device)


class SlabRun:
    """Encodes images with `uses_slabs`: threads fill slabs while the device computes, and results arrive a batch later."""

    def __init__(self, model: ImageModel) -> None:
        import torch

        self.model = model
        white = Image.new("RGB", (64, 64), "white")
        self._deferred = _normalises_alike(model)
        self._prepare = model.pixels if self._deferred else model.prepare
        device = torch.device(model.device)
        self._slabs = deque(Slab(model.batch.size, self._prepare(white), device) for _ in range(_FILLING + 1))
        self._arriving: deque[tuple[list[int], Download]] = deque()
        self._vectors: dict[int, np.ndarray] = {}
        self._errors: dict[int, str] = {}

    def encode(self, inputs: Iterable[bytes], advance: Advance) -> Encoded:
        """Return the vectors in the order of the inputs; images that cannot be decoded are failed, with the reason."""
        count = 0
        filling: deque[tuple[int, Slab, list[Future[str | None]]]] = deque()
        with ThreadPoolExecutor(max(1, default_workers(self.model.spec.workers))) as pool:
            for group in chunks(inputs, lambda: self.model.batch.size):
                slab = self._slabs[0]
                self._slabs.rotate(-1)
                slab.wait()
                filling.append((count, slab, [pool.submit(self._write, slab, *one) for one in enumerate(group)]))
                count += len(group)
                if len(filling) > _FILLING:
                    self._compute(*filling.popleft(), advance)
            while filling:
                self._compute(*filling.popleft(), advance)
        self._collect(0)
        return collect(self._vectors, self._errors, count, self.model.dim)

    def _write(self, slab: Slab, row: int, data: bytes) -> str | None:
        """Write a prepared image to a row; return the reason if it cannot be decoded."""
        try:
            image = decode(data)
        except UnreadableError as reason:
            return str(reason)
        slab.write(row, self._prepare(image))
        return None

    def _compute(self, first: int, slab: Slab, futures: Sequence["Future[str | None]"], advance: Advance) -> None:
        reasons = [future.result() for future in futures]
        good = [row for row, reason in enumerate(reasons) if reason is None]
        self._errors.update({first + row: reason for row, reason in enumerate(reasons) if reason is not None})
        batch, done = self.model.batch, 0
        while done < len(good):
            rows = good[done : done + batch.size]
            download = batch.attempt(partial(self._start, slab), rows)
            if download is not None:
                self._arriving.append(([first + row for row in rows], download))
                done += len(rows)
        advance(len(reasons), ok=len(good), failed=len(reasons) - len(good))
        self._collect(1)

    def _start(self, slab: Slab, rows: Sequence[int]) -> Download:
        import torch

        with torch.inference_mode(), arithmetic(self.model.device, self.model.spec.precision):
            stack = slab.upload(rows)
            return Download(self.model.vectors_of(self.model.normalised(stack) if self._deferred else stack))

    def _collect(self, left: int) -> None:
        """Wait for all results but the last `left`."""
        while len(self._arriving) > left:
            rows, download = self._arriving.popleft()
            self._vectors.update(zip(rows, download.wait(), strict=True))


def _normalises_alike(model: ImageModel) -> bool:
    """Return whether `normalised` of `pixels` is `prepare`, to the bit on the CPU: some processors pad after they normalise."""
    import torch

    noise = np.random.default_rng(0).integers(0, 256, (48, 97, 3), np.uint8)
    for values in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(values))
        expected = model.prepare(image)
        try:
            found = model.normalised(model.pixels(image)[None])[0]
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            return False
        if not (isinstance(expected, torch.Tensor) and torch.equal(found, expected)):
            return False
    return True
