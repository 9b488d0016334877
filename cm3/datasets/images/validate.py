"""Image validation: decodes the whole file, and recognises placeholders by size or sha256."""

import hashlib
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from PIL import Image

from cm3.common.image_decode import UnreadableError, load_image

# An image with a side this short shows no product: shops send a dot in place of a missing image.
_DOT = 2
# Images above so many pixels are decoded one at a time, whatever the number of threads, to bound memory.
_HUGE = 8_000_000
_one_huge = threading.Lock()


class PlaceholderError(UnreadableError):
    """The bytes are a placeholder image ("no image"): the item's image is missing."""

    def __init__(self, image: "ImageFacts", reason: str) -> None:
        super().__init__("placeholder", reason)
        self.image = image


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts about an image that decodes: sha256 of its bytes, width and height in pixels as stored, Pillow's format."""

    sha256: str
    width: int
    height: int
    format: str


def examine(data: bytes, max_pixels: int, placeholders: Collection[str] = ()) -> ImageFacts:
    """Decode an image completely and return its facts.

    A JPEG is decoded at an eighth of its size, which is faster: every coded byte is read, and it fails on exactly the
    bytes that fail at full size.

    Args:
        data: the bytes of the file.
        max_pixels: largest allowed width x height.
        placeholders: sha256 digests of known images that mean "no image".

    Raises:
        PlaceholderError: a dot, or one of `placeholders`.
        UnreadableError: empty, not an image, too large or slow to decode, truncated or corrupt.
        UserError: a fault of the machine, such as too little memory.
    """

    def prepare(image: Image.Image) -> AbstractContextManager[object]:
        huge = image.width * image.height > _HUGE
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (1, 1))  # None keeps the mode
        return _one_huge if huge else nullcontext()

    loaded = load_image(data, max_pixels, prepare)
    found = ImageFacts(hashlib.sha256(data).hexdigest(), *loaded.size, loaded.format)
    check_placeholder(found, placeholders)
    return found


def check_placeholder(image: ImageFacts, placeholders: Collection[str]) -> None:
    """Raise PlaceholderError for an image at most 2 pixels wide or high, or one whose digest is in `placeholders`."""
    if min(image.width, image.height) <= _DOT:
        raise PlaceholderError(image, f"a placeholder of {image.width} x {image.height} pixels")
    if image.sha256 in placeholders:
        raise PlaceholderError(image, f"a placeholder, {image.sha256[:12]}... in images.placeholders")
