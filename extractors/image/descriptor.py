"""Image descriptor without trained weights: colour, texture and shape of the foreground."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.image_decode import UnreadableError, decode
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.image import descriptor_features
from extractors.image.item_images import image_of, read_images
from extractors.runtime.prefetch import chunks, map_ahead, process_pool
from extractors.runtime.source import Source
from extractors.spec import BackendSpec, Cost

SIDE = 128
"""Longest side in pixels after the initial resize."""

BLOCKS = {"colour": 0.7, "layout": 0.5, "texture": 0.7, "gradients": 1.5, "silhouette": 1.0}
"""Blocks of the vector and the length of each: their squares are the weights of the blocks in a cosine."""

_CHUNK = 32
_POOL_PAYS_FROM = 256


class DescriptorSpec(BackendSpec):
    """An image descriptor without trained weights: no download, no GPU."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pillow", "scikit-image")
    cost: ClassVar[Cost] = Cost(1000, 0, 50)
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    modality: Literal["image"] = Field(description="Always image.")
    backend: Literal["descriptor"] = Field(description="Describe images by colour, texture and shape.")

    def model_identity(self) -> dict[str, Any]:
        """Return the version of the library that computes the blocks."""
        return {"scikit_image_version": metadata.version("scikit-image")}

    def needs(self) -> set[str]:
        """Return items and manifest."""
        return {"items", "manifest"}

    def uses_gpu(self) -> bool:
        """Return False: there is no model."""
        return False

    def read(self, inputs: Mapping[str, Path]) -> Source[bytes]:
        """Return the images of the manifest."""
        return read_images(inputs["items"], inputs["manifest"])

    def load(self) -> "DescriptorExtractor":
        """Return the extractor."""
        return DescriptorExtractor(self)


class DescriptorExtractor(Extractor[bytes]):
    """Colour, layout, texture, gradients and silhouette of an image's foreground, each scaled and concatenated."""

    def __init__(self, spec: DescriptorSpec) -> None:
        self.spec = spec
        self.dim = len(describe(Image.new("RGB", (8, 8), "white")))

    def input_of(self, item: Mapping[str, Any]) -> bytes | None:
        """Return the bytes of the item's image."""
        return image_of(item)

    def facts(self) -> dict[str, Any]:
        """Return the size of the resized images and the lengths of the blocks."""
        return {"preprocessing": {"side": SIDE, "blocks": BLOCKS}}

    def run(self, inputs: Iterable[bytes], advance: Advance = silent) -> Encoded:
        """Describe images, in worker processes if there are many; those that cannot be decoded are failed, with the reason."""
        vectors: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        count = 0
        # Processes only if `workers` is set, as jobs do: they would import an unguarded script of the caller again.
        for described in _in_processes(inputs, self.spec.workers or 1):
            for one in described:
                if isinstance(one, str):
                    errors[count] = one
                else:
                    vectors[count] = one
                count += 1
            failed = sum(isinstance(one, str) for one in described)
            advance(len(described), ok=len(described) - failed, failed=failed)
        return collect(vectors, errors, count, self.dim)


def _in_processes(images: Iterable[bytes], workers: int) -> Iterator[list[np.ndarray | str]]:
    """Yield chunks of descriptions in order; few images are described in this process."""
    iterator = iter(images)
    first = list(itertools.islice(iterator, _POOL_PAYS_FROM))
    groups = chunks(itertools.chain(first, iterator), lambda: _CHUNK)
    if workers < 2 or len(first) < _POOL_PAYS_FROM:
        yield from map(_describe_chunk, groups)
        return
    try:
        with process_pool(workers) as pool:
            for (described,) in map_ahead(pool, _describe_chunk, ([group] for group in groups), 2 * workers):
                yield described
    except BrokenProcessPool:
        raise UserError(
            "a process that describes images was killed, probably for lack of memory; set fewer `workers` for the extractor "
            "and run the same command again"
        ) from None


def _describe_chunk(images: list[bytes]) -> list[np.ndarray | str]:
    described: list[np.ndarray | str] = []
    for data in images:
        try:
            described.append(describe(decode(data, draft=2 * SIDE)))
        except UnreadableError as reason:
            described.append(str(reason))
    return described


def describe(image: Image.Image) -> np.ndarray:
    """Return the (1101,) float32 description of an RGB image, of unit length."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    part = descriptor_features.foreground(np.asarray(small))
    blocks = []
    for name, length in BLOCKS.items():
        block = getattr(descriptor_features, name)(part)
        norm = np.linalg.norm(block)
        blocks.append(block * (length / norm) if norm > 0 else block)
    vector: np.ndarray = np.concatenate(blocks)
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit.astype(np.float32)
