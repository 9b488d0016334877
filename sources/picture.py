"""Whether bytes are a picture: its header is checked before anything is decoded, then all of it is decoded."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

# Formats that Pillow decodes by itself. EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class UnreadableError(Exception):
    """The bytes are no picture that can be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """What is known of a picture that decodes: sha256 of its bytes, size in pixels as stored, Pillow's format name."""

    sha256: str
    width: int
    height: int
    format: str


def examine(data: bytes, max_pixels: int) -> Picture:
    """Return what the picture in `data` is, after decoding all of it.

    Raises:
        UnreadableError: empty, no picture, too many pixels, truncated or corrupt.
    """
    if not data:
        raise UnreadableError("0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableError(f"{width} x {height} pixels are more than the {max_pixels} allowed")
            image.load()
            return Picture(hashlib.sha256(data).hexdigest(), width, height, image.format or "")
    except UnidentifiedImageError:
        raise UnreadableError(f"not a picture; it starts with {data[:20]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"too many pixels ({error})") from None
    # Decoders fail on strangers' bytes in many ways (OSError, SyntaxError, struct.error, ...); each means one thing.
    except Exception as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(f"corrupt: {error or type(error).__name__}") from error
