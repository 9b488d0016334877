"""Blocks of the image descriptor: colour, layout, texture, gradients and silhouette."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

CROP = 64
CONTRAST = 8.0
"""Distance in CIE Lab from the background's colour at which a pixel counts as foreground; 2.3 is just noticeable."""

LAB_BINS = (4, 8, 8)
LAB_LOW, LAB_HIGH = (0.0, -80.0, -80.0), (100.0, 80.0, 80.0)
LBP = ((8, 1), (16, 2))
"""Local binary patterns: (points, radius in pixels)."""


@dataclass(frozen=True)
class Foreground:
    """Foreground of an image with a plain background, cropped to its bounding box; else the whole image.

    Attributes:
        lab: (h, w, 3) float32 in CIE Lab.
        mask: (h, w) bool.
        background: (3,) the background's colour.
    """

    lab: np.ndarray
    mask: np.ndarray
    background: np.ndarray


def foreground(rgb: np.ndarray) -> Foreground:
    """Return the foreground of an (H, W, 3) uint8 image: pixels that differ from the median colour of the border."""
    from skimage.color import rgb2lab

    lab = rgb2lab(rgb).astype(np.float32)
    frame = np.concatenate([side.reshape(-1, 3) for side in (lab[:2], lab[-2:], lab[:, :2], lab[:, -2:])])
    background = np.median(frame, axis=0)
    plain = (np.linalg.norm(frame - background, axis=1) < CONTRAST).mean() >= 0.5
    mask = np.linalg.norm(lab - background, axis=2) > CONTRAST
    if not plain or mask.mean() < 0.01:
        mask = np.ones(mask.shape, dtype=bool)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Foreground(lab[box], mask[box], background)


def colour(part: Foreground) -> np.ndarray:
    """Return a (256,) joint Lab histogram of the foreground, each pixel shared among the 8 nearest bins; square roots."""
    bins, low, high = np.array(LAB_BINS), np.array(LAB_LOW, np.float32), np.array(LAB_HIGH, np.float32)
    place = np.clip((part.lab[part.mask] - low) / (high - low) * bins - 0.5, 0, bins - 1)
    base = np.minimum(place.astype(np.int64), bins - 2)
    near = place - base
    histogram = np.zeros(int(np.prod(bins)))
    for corner in np.ndindex(2, 2, 2):
        share = np.where(corner, near, 1 - near).prod(axis=1)
        index = np.ravel_multi_index(tuple((base + corner).T), LAB_BINS)
        histogram += np.bincount(index, share, len(histogram))
    return np.sqrt(histogram)


def layout(part: Foreground) -> np.ndarray:
    """Return (48,): the mean Lab colour of the foreground in each cell of a 4 x 4 grid."""
    cover = _shrunk(_square(part.mask, 0.0), 4)
    channels = []
    for channel, middle in enumerate((50.0, 0.0, 0.0)):
        total = _shrunk(_square(np.where(part.mask, part.lab[..., channel], 0.0), 0.0), 4)
        channels.append(np.where(cover > 0.05, total / np.maximum(cover, 0.05) - middle, 0.0))
    return np.stack(channels).ravel()


def texture(part: Foreground) -> np.ndarray:
    """Return (28,): histograms of uniform local binary patterns of the foreground's lightness; square roots."""
    from skimage.feature import local_binary_pattern

    lightness = np.clip(part.lab[..., 0] * 2.55, 0, 255).astype(np.uint8)
    parts = []
    for points, radius in LBP:
        patterns = local_binary_pattern(lightness, points, radius, "uniform").astype(np.int64)
        parts.append(np.bincount(patterns[part.mask], minlength=points + 2) / part.mask.sum())
    roots: np.ndarray = np.sqrt(np.concatenate(parts))
    return roots


def gradients(part: Foreground) -> np.ndarray:
    """Return (512,): a histogram of oriented gradients of 8 x 8 cells, normalised as a whole; square roots."""
    from skimage.feature import hog

    lightness = np.where(part.mask, part.lab[..., 0], part.background[0])
    square = _shrunk(_square(lightness, float(part.background[0])), CROP)
    histogram = hog(square, orientations=8, pixels_per_cell=(8, 8), cells_per_block=(8, 8))
    roots: np.ndarray = np.sqrt(histogram)
    return roots


def silhouette(part: Foreground) -> np.ndarray:
    """Return (257,): how much of each cell of a 16 x 16 grid the foreground covers, and the log of its aspect ratio."""
    height, width = part.mask.shape
    cover = _shrunk(_square(part.mask, 0.0), 16).ravel() - 0.5
    return np.append(cover, 2 * np.log(width / height))


def _square(values: np.ndarray, fill: float) -> np.ndarray:
    """Return an (h, w) array in the middle of a square, the rest filled."""
    height, width = values.shape
    side = max(height, width)
    square = np.full((side, side), fill, np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = values
    return square


def _shrunk(square: np.ndarray, side: int) -> np.ndarray:
    smooth = Image.Resampling.BOX if side < len(square) else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(square).resize((side, side), smooth))
