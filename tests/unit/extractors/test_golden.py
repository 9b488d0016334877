"""Golden vectors of every encoder backend, of the extract and control stages, and of the assembly of item texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import tiny_vlm
from fixed_weights import fill
from fixtures_extractors import shape, write_images, write_items
from golden import check_golden, digest, summary
from safetensors.torch import save_file

import extractors
from cm3.common.features import read_features, write_features
from cm3.common.reduction import Reduction
from cm3.common.stages import STAGES
from extractors.control import CONTROLS, control
from extractors.extract import extract
from extractors.reduce import reduce
from extractors.registry import spec_class
from extractors.text.item_text import FIELDS, item_text

IMAGES = [shape("circle", "blue", 48, 1), shape("square", "red", 80, 2), shape("circle", "green", 64, 3)]
TITLES = ["red shoe", "blue bag for women", "a long pan : a red pan for the blue shoe"]
ITEMS: list[dict[str, Any]] = [
    {"item_id": f"i{row}", "title": title, "image": image}
    for row, (title, image) in enumerate(zip(TITLES, IMAGES, strict=True))
]


def vectors(backend: str, modality: str, **settings: Any) -> dict[str, Any]:
    extractor = extractors.load({"modality": modality, "backend": backend, **settings})
    encoded = extractor.encode(ITEMS)
    assert encoded.status.tolist() == ["ok"] * len(ITEMS)
    return summary(encoded.embedding)


def check_backend(backend: str, outputs: dict[str, Any]) -> None:
    check_golden(f"extractor-{backend}", spec_class(backend).version, outputs)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_transformers.save_text("bert", tmp_path_factory.mktemp("bert"))
    fill(folder / "model.safetensors")
    return folder


def test_transformers_text(bert: Path) -> None:
    data: dict[str, Any] = {"weights": str(bert), "device": "cpu", "fields": ["title"]}
    outputs = {
        pooling: vectors("transformers-text", "text", pooling=pooling, **data)
        for pooling in ("mean", "cls", "last", "max")
    }
    settings = {"prompt": "query: ", "normalise": False, "max_length": 9, "truncate_dim": 8}
    outputs["settings"] = vectors("transformers-text", "text", **data, **settings)
    check_backend("transformers-text", outputs)


def test_sentence_transformers(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    SentenceTransformer(modules=[Transformer(str(bert)), Pooling(32)], device="cpu").save(str(tmp_path))
    data: dict[str, Any] = {"weights": str(tmp_path), "device": "cpu", "fields": ["title"]}
    settings = {"prompt": "query: ", "normalise": False, "max_length": 9, "truncate_dim": 8}
    outputs = {
        "default": vectors("sentence-transformers", "text", **data),
        "settings": vectors("sentence-transformers", "text", **data, **settings),
    }
    check_backend("sentence-transformers", outputs)


def test_timm(tmp_path: Path) -> None:
    import timm

    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), file)
    fill(file)
    data: dict[str, Any] = {"model": "test_efficientnet", "weights": str(file), "device": "cpu"}
    outputs = {
        "default": vectors("timm", "image", **data),
        "settings": vectors("timm", "image", **data, input_size=64, crop_mode="squash", normalise=True),
    }
    check_backend("timm", outputs)


def test_open_clip(tmp_path: Path) -> None:
    import open_clip

    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_model.safetensors")
    fill(tmp_path / "open_clip_model.safetensors")
    data: dict[str, Any] = {"weights": str(tmp_path), "device": "cpu"}
    outputs = {
        "default": vectors("open_clip", "image", **data),
        "settings": vectors("open_clip", "image", **data, resize_mode="squash", normalise=True),
    }
    check_backend("open_clip", outputs)


def test_transformers_vision(tmp_path: Path) -> None:
    outputs = {}
    for kind in ("clip", "dinov2-registers", "resnet"):
        folder = tiny_transformers.save_vision(kind, tmp_path / kind)
        fill(folder / "model.safetensors")
        for pooling in ("model", "mean") if kind == "resnet" else ("model", "cls", "mean"):
            data = {"weights": str(folder), "device": "cpu", "pooling": pooling}
            outputs[f"{kind}, {pooling}"] = vectors("transformers-vision", "image", **data)
    check_backend("transformers-vision", outputs)


def test_transformers_mllm(tmp_path: Path) -> None:
    processor, model = tiny_vlm.build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    fill(tmp_path / "model.safetensors")
    data: dict[str, Any] = {"weights": str(tmp_path), "device": "cpu", "precision": "float32"}
    outputs = {
        "default": vectors("transformers-mllm", "mllm", **data),
        "settings": vectors(
            "transformers-mllm", "mllm", **data, prompt="{title}?", layer=1, pooling="mean", max_pixels=800
        ),
    }
    check_backend("transformers-mllm", outputs)


def test_descriptor() -> None:
    check_backend("descriptor", {"default": vectors("descriptor", "image")})


def test_tfidf() -> None:
    outputs = {
        "words": vectors("tfidf", "words"),
        "settings": vectors("tfidf", "text", terms="characters", ngrams=[2, 3], min_items=1, dim=2),
    }
    check_backend("tfidf", outputs)


def test_precomputed(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    ids = ["i2", "i0", "other", "i1"]
    write_features(tmp_path / "v.parquet", ids, values, ["ok", "ok", "ok", "missing"], {})
    np.save(tmp_path / "v.npy", values)
    (tmp_path / "ids.txt").write_text("".join(f"{one}\n" for one in ids))
    records = np.zeros(4, np.dtype([("id", "S10"), ("vector", "<f4", (3,))]))
    records["id"], records["vector"] = [one.encode() for one in ids], values
    (tmp_path / "v.b").write_bytes(records.tobytes())
    files: dict[str, dict[str, Any]] = {
        "parquet": {"path": str(tmp_path / "v.parquet")},
        "npy": {"path": str(tmp_path / "v.npy"), "ids": str(tmp_path / "ids.txt")},
        "amazon-b": {"path": str(tmp_path / "v.b"), "dim": 3},
        "microlens": {"path": str(tmp_path / "v.npy"), "format": "microlens"},
    }
    outputs = {}
    for name, settings in files.items():
        extractor = extractors.load({"modality": "sound", "backend": "precomputed", **settings})
        encoded = extractor.encode([{"item_id": one} for one in ("i0", "i1", "i2", "3", "none")])
        outputs[name] = {"vectors": encoded.embedding.tolist(), "status": encoded.status.tolist()}
    check_backend("precomputed", outputs)


def test_extract_stage(tmp_path: Path) -> None:
    images = [IMAGES[0], None, b"no image", IMAGES[1], IMAGES[0]]
    inputs = {"items": write_items(tmp_path, [{}] * 5), "manifest": write_images(tmp_path / "images", images)}
    data = {"modality": "image", "backend": "descriptor", "dtype": "float16", "workers": 1, "shard_size": 2}
    extract(extractors.parse_extractor("looks", data, "looks"), inputs, tmp_path / "f.parquet", code="extract 1")
    features = read_features(tmp_path / "f.parquet")
    outputs = {
        "vectors": summary(features.embedding),
        "status": features.status.tolist(),
        "item_ids": features.item_ids,
    }
    check_golden("extract", STAGES["extract"].version, outputs)


def test_control_stage(tmp_path: Path) -> None:
    vectors = np.random.Generator(np.random.PCG64(1)).standard_normal((20, 6)).astype(np.float32)
    status = ["ok"] * 18 + ["missing", "failed"]
    write_features(tmp_path / "f.parquet", [f"i{row}" for row in range(20)], vectors, status, {})
    outputs = {}
    for kind in CONTROLS:
        arguments: dict[str, Any] = {"kind": kind, "seed": 3, "modality": "text"}
        counts = control(features=tmp_path / "f.parquet", output=tmp_path / "c.parquet", **arguments)
        outputs[kind] = {"vectors": summary(read_features(tmp_path / "c.parquet").embedding), "counts": counts}
    check_golden("control", STAGES["control"].version, outputs)


def test_reduce_stage(tmp_path: Path) -> None:
    vectors = np.random.Generator(np.random.PCG64(1)).standard_normal((20, 6)).astype(np.float32) * np.arange(1, 7) + 1
    status = ["ok"] * 18 + ["missing", "failed"]
    write_features(tmp_path / "f.parquet", [f"i{row}" for row in range(20)], vectors, status, {})
    facts = reduce(
        features=tmp_path / "f.parquet",
        output=tmp_path / "r.parquet",
        projection=tmp_path / "r.safetensors",
        reduction=Reduction(method="pca", dim=3),
    )
    outputs = {"vectors": summary(read_features(tmp_path / "r.parquet").embedding), "facts": facts}
    check_golden("reduce", STAGES["reduce"].version, outputs)


def test_item_texts() -> None:
    """Their version is that of the text backends: all texts of items are made in the same way."""
    items: list[dict[str, Any]] = [
        {
            "title": " Red\tshoe\n",
            "brand": "Ätna",
            "categories": ["Shoes", " ", "Women"],
            "description": "a\x00b \u00a0c",
        },
        {"title": None, "features": ["soft", None, "warm"], "details": ["size: 4"], "description": ""},
        {"title": "half \ud800 pair", "categories": []},
        {"brand": "  "},
    ]
    texts = [item_text(item) for item in items] + [item_text(item, ["details", "title"]) for item in items]
    versions = {spec_class(backend).version for backend in ("sentence-transformers", "transformers-text")}
    assert len(versions) == 1
    check_golden("item-text", versions.pop(), {"fields": list(FIELDS), "texts": digest(texts)})
