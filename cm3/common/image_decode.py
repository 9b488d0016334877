"""Safe decoding of untrusted images with Pillow: allowed formats, limits before decoding, truncated pixels are an error.

The images stage and all extractors decode with `load_image`, so a file is an image for all of them or for none.
"""

import functools
import io
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from cm3.common.errors import UserError, machine_fault
from cm3.common.image_metadata import (
    Pixels,
    TooManyPartsError,
    jpeg_scans,
    orientation,
    stated_pixels,
    without_metadata,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are opened: their decoders are part of Pillow and start no other program (EPS, for one, starts Ghostscript)."""
MAX_PIXELS = 64_000_000
MAX_RATIO = 300
"""Longest side over shortest. A model that resizes the shortest to 448 pixels makes 180 MB of such an image."""
MAX_SCANS = 100
"""Scans of a JPEG. A progressive one has about 10, and each takes the time of decoding the whole image."""
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""Pixels of a JPEG times its scans: at most a minute of decoding."""

_DECODING = "decoding an image"
# Memory of a decoder: coefficients of a progressive JPEG in four colours (8 bytes) and the pixels.
_BYTES_PER_PIXEL, _LEAST_MEMORY = 12, 1 << 24
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(Exception):
    """The bytes are not a usable image. The message is the reason.

    Attributes:
        kind: a short category of the reason, for counting.
        decoder: whether it is the decoder that could not read the bytes.
    """

    def __init__(self, kind: str, reason: str = "", decoder: bool = False) -> None:
        super().__init__(reason or kind)
        self.kind, self.decoder = kind, decoder


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A decoded image.

    Attributes:
        image: its pixels in the file's own mode, not rotated; the first frame of an animation.
        size: width and height in pixels as stored; `image` is smaller if a draft was asked for.
        format: Pillow's name of the format.
        orientation: its EXIF orientation, 1 to 8; 1 if it has none or the pixels are rotated already.
    """

    image: Image.Image
    size: tuple[int, int]
    format: str
    orientation: int


Prepare = Callable[[Image.Image], AbstractContextManager[object]]


def load_image(data: bytes, max_pixels: int = MAX_PIXELS, prepare: Prepare = nullcontext) -> LoadedImage:
    """Decode an image. Metadata are ignored, except the orientation: an image whose pixels are whole is whole.

    May be used in threads.

    Args:
        data: the original bytes of the file.
        max_pixels: largest allowed width x height.
        prepare: called with the image before its pixels are decoded, for example to set a draft; it may raise
            UnreadableError. The pixels are decoded within the context that it returns.

    Raises:
        UnreadableError: empty, not an image in one of FORMATS, too large or slow to decode, truncated or corrupt.
        UserError: a fault of the machine, such as too little memory or too many open files.
    """
    if not data:
        raise UnreadableError("empty", "0 bytes")
    first: UnreadableError | None = None
    try:
        for pixels in without_metadata(data):
            try:
                return _load(pixels, max_pixels, prepare)
            except UnreadableError as error:
                if not error.decoder:
                    raise
                first = first or error
    except TooManyPartsError as error:
        raise UnreadableError("too many parts", str(error)) from None
    assert first is not None
    raise first


def _load(pixels: Pixels, max_pixels: int, prepare: Prepare) -> LoadedImage:
    size = None
    try:
        with _bomb_warnings_are_errors, Image.open(io.BytesIO(pixels.data), formats=_available_formats()) as image:
            size = width, height = image.size
            if width * height > max_pixels:
                raise UnreadableError(
                    "too many pixels", f"{width} x {height} pixels are more than the {max_pixels} allowed"
                )
            _require_few_scans(image, pixels.data)
            with prepare(image):
                image.load()
            return LoadedImage(image, size, image.format or "", _orientation(image, pixels))
    except UnreadableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError("too many pixels", f"too many pixels ({error})") from None
    # Decoders raise many types of exception for damaged bytes: OSError without a number, SyntaxError, struct.error, ...
    except Exception as error:
        if fault := machine_fault(error, _DECODING) or _memory_fault(
            min(size[0] * size[1] if size else stated_pixels(pixels.data), max_pixels)
        ):
            raise fault from error
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image; it starts with {pixels.data[:20]!r}"
            raise UnreadableError("not an image", reason, decoder=True) from None
        reason = str(error) or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "corrupt"
        raise UnreadableError(kind, f"corrupt: {reason}", decoder=True) from error


def _orientation(image: Image.Image, pixels: Pixels) -> int:
    if image.format == "TIFF":
        return 1  # Pillow rotates these itself
    exif, xmp = image.info.get("exif"), image.info.get("xmp")  # of WebP and AVIF
    return orientation(exif or pixels.exif, xmp or pixels.xmp)


def _require_few_scans(image: Image.Image, data: bytes) -> None:
    if image.format in ("JPEG", "MPO"):
        scans = jpeg_scans(data)
        most = min(MAX_SCANS, max(MAX_SCANNED_PIXELS // max(1, image.width * image.height), 1))
        if scans > most:
            raise UnreadableError(
                "too many scans",
                f"a JPEG of {image.width} x {image.height} pixels in {scans} scans, more than the {most} allowed: "
                "each takes the time of decoding a whole image",
            )


def _memory_fault(pixels: int) -> UserError | None:
    """Return the error to raise if there is no memory to decode so many pixels: some decoders call that a corrupt image."""
    try:
        np.empty(max(pixels * _BYTES_PER_PIXEL, _LEAST_MEMORY), np.uint8)
    except MemoryError as error:
        return machine_fault(error, _DECODING)
    return None


def decode(data: bytes, max_pixels: int = MAX_PIXELS, draft: int | None = None) -> Image.Image:
    """Return an image as RGB: rotated by its EXIF orientation, transparency on white, first frame of an animation.

    Args:
        data: the original bytes of the file.
        max_pixels: largest allowed width x height; the header is checked before decoding.
        draft: decode a JPEG at the smallest eighth of its size whose sides are at least this many pixels.

    Raises:
        UnreadableError: as `load_image`, or one side is over MAX_RATIO times the other, or the pixels have no range.
        UserError: a fault of the machine, such as too little memory.
    """

    def prepare(image: Image.Image) -> AbstractContextManager[object]:
        width, height = image.size
        if max(width, height) > MAX_RATIO * min(width, height):
            raise UnreadableError(
                "too narrow", f"{width} x {height} pixels: one side is over {MAX_RATIO} times the other"
            )
        if draft is not None:
            image.draft("RGB", (draft, draft))
        return nullcontext()

    loaded = load_image(data, max_pixels, prepare)
    image = loaded.image
    try:
        if loaded.orientation in _TURNS:
            image = image.transpose(_TURNS[loaded.orientation])
        return _to_rgb(image)
    except (MemoryError, ValueError, OSError) as error:
        if fault := machine_fault(error, _DECODING):
            raise fault from error
        raise UnreadableError("corrupt", f"corrupt: {error}") from error


class _BombWarningsAreErrors:
    """Makes Pillow's DecompressionBombWarning an error, and drops its others, while a thread is inside the context."""

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
                warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata
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
