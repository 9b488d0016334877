"""Images of the sample dataset: a coloured, patterned shape on a pale background."""

import hashlib
import io

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

_COLOURS = {
    "red": (205, 30, 38),
    "orange": (240, 128, 24),
    "yellow": (238, 205, 40),
    "green": (46, 145, 58),
    "teal": (22, 150, 150),
    "blue": (38, 78, 200),
    "purple": (120, 48, 165),
    "pink": (238, 115, 175),
    "brown": (118, 70, 34),
    "grey": (112, 112, 116),
}
_SMOOTHING = 2  # drawn larger by this factor, then reduced


def draw(rng: np.random.Generator, colour: str, pattern: str, shape: str, size: int) -> bytes:
    """Return a JPEG of size x size pixels; position, angle, scale, shade and background vary with `rng`."""
    large = size * _SMOOTHING
    base = np.clip(np.asarray(_COLOURS[colour]) + rng.normal(0, 5, 3), 0, 255)
    mask = _mask(rng, shape, large)
    # Patterns are white, since a lighter red, for one, would be pink.
    white = Image.fromarray(_pattern(rng, pattern, large).astype(np.uint8) * 255)
    scene = Image.new("RGB", (large, large), (int(rng.integers(236, 252)),) * 3)
    shadow = mask.filter(ImageFilter.BoxBlur(large // 40)).point(lambda v: v // 4)
    scene.paste((40, 40, 50), (large // 50, large // 40), shadow)
    scene.paste(tuple(int(v) for v in base), (0, 0), mask)
    scene.paste((250, 250, 250), (0, 0), ImageChops.darker(white, mask))
    file = io.BytesIO()
    scene.reduce(_SMOOTHING).save(file, "JPEG", quality=85)
    return file.getvalue()


def _pattern(rng: np.random.Generator, pattern: str, size: int) -> np.ndarray:
    """Return (size, size) bool: white pixels."""
    if pattern == "plain":
        return np.zeros((size, size), bool)
    angle = rng.uniform(-0.3, 0.3) + (np.pi / 4 if pattern == "striped" else 0)
    period = size * rng.uniform(0.11, 0.15)
    step = np.arange(size, dtype=np.float32) / np.float32(period)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    across = step * cosine + (step * sine)[:, None] + np.float32(rng.random())
    along = (step * cosine)[:, None] - step * sine + np.float32(rng.random())
    across -= np.floor(across)
    if pattern == "striped":
        return across < 0.45
    if pattern == "zigzag":
        along += np.abs(across - 0.5) * 1.6
    along -= np.floor(along)
    if pattern == "zigzag":
        return along < 0.42
    if pattern == "checked":
        return (across < 0.5) ^ (along < 0.5)
    if pattern == "dotted":
        return (across - 0.5) ** 2 + (along - 0.5) ** 2 < 0.3**2
    raise ValueError(f"unknown pattern: {pattern!r}")


def _mask(rng: np.random.Generator, shape: str, size: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)
    radius = size * rng.uniform(0.38, 0.44)
    centre = size / 2 + rng.uniform(-0.04, 0.04, 2) * size
    turn = rng.uniform(-0.2, 0.2)
    if shape in ("circle", "moon"):
        pen.ellipse([*(centre - radius), *(centre + radius)], fill=255)
        if shape == "moon":
            inner, bite = radius * 0.85, centre + radius * 0.6 * np.asarray([np.cos(turn), np.sin(turn)])
            pen.ellipse([*(bite - inner), *(bite + inner)], fill=0)
        return mask
    pen.polygon([tuple(point) for point in centre + radius * _turned(_outline(shape), turn)], fill=255)
    return mask


def _outline(shape: str) -> np.ndarray:
    """Return (n, 2) corner points within the unit circle, y downwards."""
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y], axis=1) / 16.5
    if shape == "cross":
        arm = 0.36
        quarter = np.asarray([[arm, -1], [arm, -arm], [1, -arm]])
        return np.concatenate([_turned(quarter, n * np.pi / 2) for n in range(4)])
    corners = {"triangle": 3, "square": 4, "hexagon": 6, "star": 10}[shape]
    start = np.pi / 4 if shape == "square" else -np.pi / 2
    angles = start + 2 * np.pi * np.arange(corners) / corners
    lengths = np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == "star" else np.ones(corners)
    return np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    rotation = np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found: np.ndarray = points @ rotation.T
    return found


def spoil(jpeg: bytes, kind: int) -> bytes:
    """Return a damaged image file: empty, a web page, truncated, or with random bytes as header."""
    damaged = (
        b"",
        b"<html><body><h1>404 Not Found</h1></body></html>\n",
        jpeg[: len(jpeg) // 3],
        hashlib.sha256(jpeg).digest() + jpeg[32:],
    )
    return damaged[kind % len(damaged)]
