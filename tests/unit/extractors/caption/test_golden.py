"""Golden outputs of captioning: prompts, requests to a server, and the captions of a tiny fitted model."""

import base64
import io
from typing import Any

import pytest
import tiny_vlm
from caption_server import no_time_to_lose, serving, spec_of  # noqa: F401
from fixtures_extractors import plain
from golden import check_golden
from PIL import Image

import extractors
from extractors.registry import spec_class

ITEMS: list[dict[str, Any]] = [
    {"title": "red <|image_pad|> shoe", "brand": "b", "categories": ["x", "y"], "image": plain("red", (90, 60))},
    {"title": "", "description": "a long " * 40, "image": plain("blue", (1, 300))},
    {"title": "green pan", "image": plain("green", (64, 64))},
]


def size_of(url: str) -> list[int]:
    """Return the size of an image in a data URL; the bytes of a JPEG depend on the library."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return list(image.size)


def test_requests_to_a_server():
    with serving() as server:
        spec = spec_of(server.url, prompt="{title} {brand} {categories}: what is it?", field_chars=30, concurrency=1)
        found = spec.load().caption(ITEMS)
    sent = []
    for asked in server.asked:
        request = dict(asked.request)
        parts = request.pop("messages")[0]["content"]
        image = next(part for part in parts if part["type"] == "image_url")["image_url"]["url"]
        sent.append({"request": request, "prompt": asked.prompt, "image": size_of(image)})
    outputs = {"sent": sent, "captions": found.captions, "status": found.status.tolist()}
    check_golden("caption-openai", spec_class("openai-caption").version, outputs)


@pytest.mark.parametrize("max_pixels", [2_000, 100_000])
def test_captions_of_a_tiny_model(tmp_path_factory, max_pixels):
    folder = tmp_path_factory.mktemp("vlm")
    settings = {"weights": str(tiny_vlm.save_fitted(folder)), "encoder": "text", "device": "cpu"}
    settings |= {"precision": "float32", "prompt": "{title} What is it?", "field_chars": 16, "max_new_tokens": 8}
    captioner = extractors.load(
        {"modality": "caption", "backend": "transformers-caption", "max_pixels": max_pixels} | settings
    )
    found = captioner.caption(ITEMS)
    outputs = {"captions": found.captions, "status": found.status.tolist(), "tokens": found.tokens.tolist()}
    check_golden(f"caption-transformers-{max_pixels}", spec_class("transformers-caption").version, outputs)
