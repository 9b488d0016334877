"""Whether bytes are an image: its header is checked before anything is decoded, then all of it is decoded."""

import hashlib
import io
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

# Formats that Pillow decodes by itself. EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# A side this short holds no product: it is the dot that shops send in place of an image.
_DOT = 2
# Images above so many pixels are decoded one at a time, whatever the number of threads: memory stays bounded.
_HUGE = 8_000_000
_one_huge = threading.Lock()


class UnreadableError(Exception):
    """The bytes are no image that can be used; the message says why, `kind` in a word or two, for counting."""

    def __init__(self, kind: str, reason: str = "") -> None:
        super().__init__(reason or kind)
        self.kind = kind


class PlaceholderError(UnreadableError):
    """The bytes are an image, but one that stands for none: the item's image is missing."""

    def __init__(self, image: "ImageFacts", reason: str) -> None:
        super().__init__("placeholder", reason)
        self.image = image


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image that decodes: sha256 of its bytes, size in pixels as stored, Pillow's format name."""

    sha256: str
    width: int
    height: int
    format: str


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Make Pillow's warning of decompression bombs an error, in all threads, while the body runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def examine(data: bytes, max_pixels: int, placeholders: Collection[str] = ()) -> ImageFacts:
    """Return what the image in `data` is, after reading all of it.

    Of a JPEG every coded byte is decoded, but to an eighth of its size, which costs less; it fails on exactly the
    bytes that fail at full size.

    Args:
        data: a file's bytes.
        max_pixels: width x height at most.
        placeholders: sha256 digests of known images that mean "no image".

    Raises:
        PlaceholderError: a dot, or one of `placeholders`.
        UnreadableError: empty, no image, too many pixels, truncated or corrupt.
    """
    if not data:
        raise UnreadableError("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableError(
                    "too many pixels", f"{width} x {height} pixels are more than the {max_pixels} allowed"
                )
            found = ImageFacts(hashlib.sha256(data).hexdigest(), width, height, image.format or "")
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (1, 1))  # None keeps the mode
            with _one_huge if width * height > _HUGE else nullcontext():
                image.load()
    except UnidentifiedImageError:
        raise UnreadableError("not an image", f"not an image; it starts with {data[:20]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError("too many pixels", f"too many pixels ({error})") from None
    # Decoders fail on strangers' bytes in many ways (OSError, SyntaxError, struct.error, ...); each means one thing.
    except Exception as error:
        if isinstance(error, UnreadableError):
            raise
        told = str(error) or type(error).__name__
        raise UnreadableError("truncated" if "truncated" in told.lower() else "corrupt", f"corrupt: {told}") from error
    refuse_placeholder(found, placeholders)
    return found


def refuse_placeholder(image: ImageFacts, placeholders: Collection[str]) -> None:
    """Raise PlaceholderError for a dot of at most 2 pixels' width or height, or one of the digests `placeholders`."""
    if min(image.width, image.height) <= _DOT:
        raise PlaceholderError(image, f"a placeholder of {image.width} x {image.height} pixels")
    if image.sha256 in placeholders:
        raise PlaceholderError(image, f"a placeholder, {image.sha256[:12]}... in images.placeholders")
