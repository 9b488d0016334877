"""Safe decoding of untrusted images with Pillow: allowed formats, pixel limit before decoding, truncation is an error."""

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cm3.common.errors import machine_fault

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are opened: their decoders are part of Pillow and start no other program (EPS, for one, starts Ghostscript)."""
MAX_PIXELS = 64_000_000
MAX_RATIO = 300
"""Longest side over shortest. A model that resizes the shortest to 448 pixels makes 180 MB of such an image."""


class UnreadableError(Exception):
    """The bytes are not a usable image. The message is the reason, `kind` is a short category of it, for counting."""

    def __init__(self, kind: str, reason: str = "") -> None:
        super().__init__(reason or kind)
        self.kind = kind


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yield an image whose header has been checked and whose pixels are not decoded yet. May be used in threads.

    Whatever Pillow raises in the body is raised as UnreadableError.

    Args:
        data: the original bytes of the file.
        max_pixels: largest allowed width x height.

    Raises:
        UnreadableError: empty, not an image in one of FORMATS, too many pixels, truncated or corrupt.
        UserError: a fault of the machine, such as too little memory or too many open files.
    """
    if not data:
        raise UnreadableError("empty", "0 bytes")
    try:
        with _bomb_warnings_are_errors, Image.open(io.BytesIO(data), formats=_available_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableError(
                    "too many pixels", f"{width} x {height} pixels are more than the {max_pixels} allowed"
                )
            yield image
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("not an image", f"not an image; it starts with {data[:20]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError("too many pixels", f"too many pixels ({error})") from None
    # Decoders raise many types of exception for damaged bytes: OSError without a number, SyntaxError, struct.error, ...
    except Exception as error:
        if fault := machine_fault(error, "decoding an image"):
            raise fault from error
        reason = str(error) or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "corrupt"
        raise UnreadableError(kind, f"corrupt: {reason}") from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS, draft: int | None = None) -> Image.Image:
    """Return an image as RGB: rotated by its EXIF orientation, transparency on white, first frame of an animation.

    Args:
        data: the original bytes of the file.
        max_pixels: largest allowed width x height; the header is checked before decoding.
        draft: decode a JPEG at the smallest eighth of its size whose sides are at least this many pixels.

    Raises:
        UnreadableError: as `open_image`, or one side is over MAX_RATIO times the other, or the pixels have no range.
    """
    with open_image(data, max_pixels) as image:
        width, height = image.size
        if max(width, height) > MAX_RATIO * min(width, height):
            raise UnreadableError(
                "too narrow", f"{width} x {height} pixels: one side is over {MAX_RATIO} times the other"
            )
        if draft is not None:
            image.draft("RGB", (draft, draft))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


class _BombWarningsAreErrors:
    """Makes Pillow's DecompressionBombWarning an error while at least one thread is inside the context."""

    # warnings.catch_warnings alone is not safe in threads: filters that one thread restores may be another's.
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.filters.__exit__(None, None, None)


_bomb_warnings_are_errors = _BombWarningsAreErrors()


@functools.cache
def _available_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of Pillow may lack a codec


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableError("no range", f"pixels of mode {image.mode} have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
