"""Golden outputs of the captioners and of the caption stage: texts, prompts, and the requests that a server receives."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlm
from caption_server import serving
from fixed_weights import fill
from fixtures_extractors import shape, write_images, write_items
from golden import check_golden, digest, summary
from PIL import Image

import extractors
from cm3.common.stages import STAGES
from cm3.common.tables import CAPTIONS, read_table
from extractors.caption.base import Captioner, CaptionSpec, capped
from extractors.caption.stage import caption
from extractors.registry import spec_class

CAPTIONERS = ("transformers-caption", "vllm-caption", "openai-caption")
IMAGES = [shape("circle", "blue", 48, 1), shape("square", "red", 80, 2), shape("circle", "green", 64, 3)]
ITEMS: list[dict[str, Any]] = [
    {"title": "red <shoe>", "brand": "Ätna", "image": IMAGES[0]},
    {"title": "<|image_pad|>", "categories": ["Bags", "Women"], "image": IMAGES[1]},
    {"description": "[INST] a\npan\x00 of steel", "image": IMAGES[2]},
]
PROMPT = "{title} by {brand}|{categories}|{description}? What is it?"


def spec_of(backend: str, **settings: Any) -> CaptionSpec:
    data = {"modality": "caption", "backend": backend, "encoder": "text", **settings}
    spec = extractors.parse_extractor("golden", data, "golden")
    assert isinstance(spec, CaptionSpec)
    return spec


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny vision-language model of fixed weights: it answers the same letters on every machine."""
    folder = tmp_path_factory.mktemp("vlm")
    processor, model = tiny_vlm.build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    fill(folder / "model.safetensors")
    return folder


def local(vlm: Path, **settings: Any) -> CaptionSpec:
    data = {"weights": str(vlm), "device": "cpu", "precision": "float32", "max_new_tokens": 12}
    return spec_of("transformers-caption", **data | settings)


def answers(spec: CaptionSpec) -> dict[str, Any]:
    captioner = spec.load()
    assert isinstance(captioner, Captioner)
    result = captioner.caption(ITEMS)
    return {"captions": result.captions, "tokens": result.tokens.tolist(), "counts": result.counts}


def test_transformers(vlm: Path) -> None:
    outputs = {
        "default": answers(local(vlm)),
        "settings": answers(local(vlm, prompt=PROMPT, field_chars=9, max_pixels=800, batch_size=2)),
    }
    check_golden("captioner-transformers", spec_class("transformers-caption").version, outputs)


def test_stage(vlm: Path, tmp_path: Path) -> None:
    images = [IMAGES[0], None, b"no image", IMAGES[1], IMAGES[0], "HTTP 404"]
    items = [{"title": f"thing {row % 4}"} for row in range(6)]
    inputs = {"items": write_items(tmp_path, items), "manifest": write_images(tmp_path / "images", images)}
    spec = local(vlm, prompt="{title}?", shard_size=2)
    record = caption(spec, inputs, tmp_path / "c.parquet", name="golden", code="caption 1")
    table = read_table(tmp_path / "c.parquet", CAPTIONS).to_pydict()
    table["error"] = [error is not None for error in table["error"]]  # not their wording
    outputs = {"table": table, "counts": record["counts"]}
    check_golden("caption", STAGES["caption"].version, outputs)


def test_server_requests() -> None:
    requests, images = [], []
    with serving() as server:
        for settings in ({}, {"prompt": PROMPT, "field_chars": 9, "max_pixels": 1000, "max_new_tokens": 9}):
            captioner = spec_of("openai-caption", url=server.url, model="teller", concurrency=1, **settings).load()
            assert isinstance(captioner, Captioner)
            captioner.caption(ITEMS)
    for asked in server.asked:
        part = asked.request["messages"][0]["content"][0]["image_url"]
        kind, _, data = part["url"].partition(",")
        part["url"] = kind
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            tables = {number: list(values) for number, values in getattr(image, "quantization").items()}  # noqa: B009
            images.append({"pixels": summary(np.asarray(image)), "tables": digest(tables)})
        requests.append(asked.request)
    outputs = {"requests": digest(requests), "images": images}
    check_golden("captioner-openai", spec_class("openai-caption").version, outputs)


def test_prompts() -> None:
    """Their version is that of all captioners."""
    settings: dict[str, dict[str, Any]] = {
        "transformers-caption": {"model": "package:tiny"},
        "vllm-caption": {"model": "package:tiny"},
        "openai-caption": {"model": "teller", "url": "http://127.0.0.1"},
    }
    outputs = {}
    for backend in CAPTIONERS:
        specs = [
            spec_of(backend, **settings[backend], **more)
            for more in ({}, {"prompt": PROMPT}, {"prompt": PROMPT, "field_chars": 9})
        ]
        outputs[backend] = digest([[spec.prompt_of(item) for item in ITEMS] for spec in specs])
    versions = {spec_class(backend).version for backend in CAPTIONERS}
    assert len(versions) == 1
    check_golden("caption-prompts", versions.pop(), outputs)


def test_image_sizes() -> None:
    """Their version is that of all captioners: what is reduced, and what gets a white border."""
    sizes = [(40, 30), (900, 600), (1, 300), (2000, 1)]
    images = [capped(Image.new("RGB", size, (200, 10, 90)), 10_000) for size in sizes]
    outputs = {"sizes": [image.size for image in images], "pixels": [summary(np.asarray(image)) for image in images]}
    check_golden("caption-images", spec_class("openai-caption").version, outputs)
