"""Thumbnails of product images as data URIs within a total size."""

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cm3.common.image_decode import UnreadableError, decode
from cm3.common.images import iter_images

log = logging.getLogger(__name__)

BUDGET = 2_600_000
_SIZES = ((160, 72), (128, 66), (104, 60))  # (longer side in pixels, WebP quality), largest first


@dataclass(frozen=True)
class Thumbnails:
    """Images by item number.

    Attributes:
        uris: data URIs.
        side: the longer side of each, in pixels.
        left_out: number of images beyond the budget.
    """

    uris: dict[int, str]
    side: int
    left_out: int


def thumbnails(manifest: Path | None, items: Sequence[int], budget: int = BUDGET) -> Thumbnails:
    """Return thumbnails of the images of `items`; items without a valid image are skipped.

    If they exceed `budget` characters, they are made smaller, and finally those of the last items are dropped.

    Args:
        manifest: the manifest.parquet of the dataset's images; None if there is none.
        items: item indices by priority; duplicates count once.
        budget: total length of all data URIs.
    """
    wanted = list(dict.fromkeys(items))
    if manifest is None or not wanted:
        return Thumbnails({}, _SIZES[0][0], 0)
    images = {}
    for item, data in iter_images(manifest, wanted):
        try:
            image = decode(data, draft=_SIZES[0][0])
        except UnreadableError as error:
            log.warning("item %d: its image became unreadable: %s", item, error)
            continue
        image.thumbnail((_SIZES[0][0],) * 2, Image.Resampling.LANCZOS)
        images[item] = image
    ordered = [item for item in wanted if item in images]
    for side, quality in _SIZES:
        uris = {item: _uri(images[item], side, quality) for item in ordered}
        if sum(map(len, uris.values())) <= budget:
            return Thumbnails(uris, side, 0)
    kept, length = {}, 0
    for item in ordered:
        length += len(uris[item])
        if length > budget:
            break
        kept[item] = uris[item]
    log.warning("%d of %d images are left out to limit the size of the page", len(ordered) - len(kept), len(ordered))
    return Thumbnails(kept, _SIZES[-1][0], len(ordered) - len(kept))


def _uri(image: Image.Image, side: int, quality: int) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
