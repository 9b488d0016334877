"""Items of which some come later, to extract features of them again."""

from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
from fixtures_extractors import shape, write_images, write_items

import extractors
from cm3.common.features import Features, read_features
from extractors.extract import extract
from extractors.image import descriptor
from extractors.text.transformers import TransformersTextExtractor

TITLES = {f"i{n}": "red shoe for women " * (n % 5 + 1) + "word " * n for n in range(44)}
OLD = [f"i{n}" for n in range(44) if n % 11 != 5]  # the 4 others come later, in between
IMAGES = {f"i{n}": shape("circle", "blue", 40 + n, n) for n in range(44)}
ALL = list(TITLES)
CODE = "extract 1, descriptor 1"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.save_text("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the models are shown, one by one: texts, or the sizes of images."""
    seen: list[Any] = []
    forward, describe = TransformersTextExtractor.forward, descriptor.describe

    def counted(self: Any, texts: Any) -> Any:
        seen.extend(texts)
        return forward(self, texts)

    def seen_image(image: Any) -> Any:
        seen.append(image.size[0])
        return describe(image)

    monkeypatch.setattr(TransformersTextExtractor, "forward", counted)
    monkeypatch.setattr(descriptor, "describe", seen_image)
    return seen


def texts_of(bert: Path, **more: Any) -> Any:
    data = {"modality": "text", "backend": "transformers-text", "weights": str(bert), "device": "cpu"}
    return extractors.parse_extractor("words", data | {"fields": ["title"]} | more, "extractors.words")


def looks(**more: Any) -> Any:
    data = {"modality": "image", "backend": "descriptor", "workers": 1}
    return extractors.parse_extractor("looks", data | more, "extractors.looks")


def shop(folder: Path, ids: list[str], titles: Any = None, images: Any = None) -> dict[str, Path]:
    titles, images = TITLES | (titles or {}), IMAGES | (images or {})
    items = [{"item_id": one, "title": titles[one]} for one in ids]
    folder.mkdir(exist_ok=True)
    return {
        "items": write_items(folder, items),
        "manifest": write_images(folder / "images", [images[one] for one in ids], ids=ids),
    }


def run(spec: Any, inputs: dict[str, Path], output: Path, code: str | None = None) -> tuple[dict[str, Any], Features]:
    output.unlink(missing_ok=True)  # as Snakemake does before it runs a job
    version = f"extract 1, {spec.backend} 1" if code is None else code
    record = extract(spec, inputs, output, name="it", code=version)
    return record, read_features(output)


def vectors(features: Features) -> dict[str, bytes]:
    return {one: row.tobytes() for one, row in zip(features.item_ids, features.embedding, strict=True)}
