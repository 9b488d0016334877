"""Bytes of an image from anywhere -> an RGB image, or the reason why not."""

import functools
import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
MAX_RATIO = 300
"""Longest side over shortest. A model that resizes the shortest to 448 pixels makes 180 MB of such an image."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What is opened at all: formats whose decoders run no code and call no other program."""


class UnreadableError(Exception):
    """An image that can't be decoded; the message is the reason."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS, draft: int | None = None) -> Image.Image:
    """Return an image as RGB: turned as EXIF says, transparency on white, first frame of an animation.

    Args:
        data: the original bytes.
        max_pixels: the largest image that is decoded; its header is checked first.
        draft: decode JPEG at the smallest eighth of its size whose sides are at least this many pixels.

    Raises:
        UnreadableError: empty, not an image, truncated, corrupt, too large, or one side is over 300 times the other.
    """
    if not data:
        raise UnreadableError("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise UnreadableError(f"{width} x {height} pixels, over the limit of {max_pixels}")
                if max(width, height) > MAX_RATIO * min(width, height):
                    raise UnreadableError(f"{width} x {height} pixels: one side is over {MAX_RATIO} times the other")
                if draft is not None:
                    image.draft("RGB", (draft, draft))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
        raise UnreadableError(f"over the limit of {max_pixels} pixels ({bomb})") from None
    except UnidentifiedImageError:
        raise UnreadableError(f"not an image in a known format (starts with {data[:8]!r})") from None
    except Exception as error:  # decoders raise errors of every kind on strangers' bytes
        raise UnreadableError(f"{type(error).__name__}: {error}") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of Pillow may lack a codec


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableError(f"pixels of mode {image.mode} have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
