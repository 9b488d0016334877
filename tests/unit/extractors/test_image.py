"""Image extraction: timm, open_clip and the weight-free descriptor, with small models saved by the test."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import COLOURS, encoded, no_room_on_the_device, plain, shape
from PIL import Image

import extractors
from cm3.common.errors import UserError
from extractors.extractor import Extractor

IMAGES = [
    shape(kind, colour, seed=seed)
    for seed, (kind, colour) in enumerate(
        [
            ("square", "red"),
            ("circle", "blue"),
            ("square", "red"),
            ("circle", "blue"),
            ("circle", "red"),
            ("square", "blue"),
        ]
    )
]
BAD = [b"", b"text", shape("square", "red")[:900]]
DESCRIPTOR = {"modality": "image", "backend": "descriptor"}


def load(data: dict[str, Any]) -> Extractor[bytes]:
    extractor = extractors.load({"modality": "image", "device": "cpu"} | data)
    assert isinstance(extractor, Extractor)
    return extractor


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small timm model with random weights, its classifier of 7 classes included."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def timm_spec(timm_file: Path) -> dict[str, Any]:
    return {"backend": "timm", "model": "test_efficientnet", "weights": str(timm_file), "input_size": 64}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights in a folder as on the hub."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
    }
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(params=["timm", "open_clip", "descriptor"])
def extractor(request: pytest.FixtureRequest) -> Extractor[bytes]:
    if request.param == "timm":
        return load(request.getfixturevalue("timm_spec"))
    if request.param == "open_clip":
        return load({"backend": "open_clip", "model": f"local-dir:{request.getfixturevalue('clip_folder')}"})
    return load(DESCRIPTOR)


def test_every_backend_tells_statuses_and_gives_batch_equal_to_single(extractor: Extractor[bytes]) -> None:
    images = [IMAGES[0], BAD[0], IMAGES[1], BAD[1], BAD[2], None]
    result = extractor.encode([{"image": image} for image in images])
    assert result.status.tolist() == ["ok", "failed", "ok", "failed", "failed", "missing"]
    assert result.errors[1] == "0 bytes" and "truncated" in result.errors[4] and set(result.errors) == {1, 3, 4}
    assert result.embedding.shape == (6, extractor.dim) and not result.embedding[[1, 3, 4, 5]].any()
    for row in (0, 2):
        alone = extractor.encode([{"image": images[row]}]).embedding[0]
        np.testing.assert_allclose(result.embedding[row], alone, atol=1e-5)
    assert not np.allclose(result.embedding[0], result.embedding[2], atol=1e-3)


def test_every_backend_takes_images_of_any_mode_and_shape(extractor: Extractor[bytes]) -> None:
    red = (220, 20, 20)
    odd = [
        plain("red", (1, 1)),
        plain("red", (1, 300)),
        plain("red", (300, 1)),
        encoded(Image.new("CMYK", (40, 40)), "JPEG"),
        encoded(Image.new("RGB", (40, 40), red).quantize(4)),
        encoded(Image.fromarray(np.full((40, 40), 51_400, np.uint16))),
        encoded(Image.new("RGBA", (40, 40), (*red, 9))),
    ]
    result = extractor.encode([{"image": image} for image in odd])
    assert result.status.tolist() == ["ok"] * len(odd) and np.isfinite(result.embedding).all()


def test_every_backend_says_what_it_did(extractor: Extractor[bytes]) -> None:
    facts = extractor.facts()
    assert json.loads(json.dumps(facts)) and "preprocessing" in facts


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size_and_worker_count_gives_the_same_vectors(timm_spec: dict[str, Any], batch: int) -> None:
    expected = load(timm_spec).run(IMAGES).embedding
    found = load(timm_spec | {"batch_size": batch, "workers": batch}).run(IMAGES).embedding
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_timm_vectors_are_those_of_timm_itself(timm_spec: dict[str, Any], timm_file: Path) -> None:
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.data import create_transform

    model = timm.create_model("test_efficientnet", num_classes=7).eval()
    model.load_state_dict(load_file(timm_file))
    model.reset_classifier(0)
    cfg = model.pretrained_cfg
    transform = create_transform(
        (3, 64, 64), mean=cfg["mean"], std=cfg["std"], interpolation=cfg["interpolation"], crop_pct=cfg["crop_pct"]
    )
    image = Image.new("RGB", (90, 70), COLOURS["green"])
    with torch.inference_mode():
        bare = model(transform(image)[None])[0].numpy()
    found = load(timm_spec).encode([{"image": encoded(image)}]).embedding[0]
    np.testing.assert_allclose(found, bare, atol=1e-4)


def test_timm_preprocessing_is_the_models_own_unless_overridden(timm_spec: dict[str, Any]) -> None:
    own = load({key: value for key, value in timm_spec.items() if key != "input_size"})
    assert own.facts()["preprocessing"]["input_size"] == (3, 160, 160)
    other = load(timm_spec | {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_mode": "squash"})
    facts = other.facts()["preprocessing"]
    assert facts["input_size"] == (3, 64, 64) and facts["mean"] == [0.5, 0.5, 0.5] and facts["crop_mode"] == "squash"


def test_a_timm_model_of_a_fixed_size_refuses_another_one(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    spec = {"backend": "timm", "model": "vit_tiny_patch16_224", "weights": str(tmp_path / "vit.safetensors")}
    with pytest.raises(UserError, match=r"input_size = 96: Input height .*set model_kwargs: \{img_size: 96\} as well"):
        load(spec | {"input_size": 96})
    assert load(spec | {"input_size": 96, "model_kwargs": {"img_size": 96}}).dim == load(spec).dim


def test_timm_folders_as_on_the_hub_load_and_other_architectures_are_refused(
    tmp_path: Path, timm_file: Path, timm_spec: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"architecture": "test_efficientnet", "num_classes": 7, "pretrained_cfg": {"input_size": [3, 64, 64]}}
        )
    )
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        load({"backend": "timm", "weights": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(timm_file.read_bytes())
    folder = load({"backend": "timm", "weights": str(tmp_path)})
    assert folder.dim == load(timm_spec).dim
    with pytest.raises(UserError, match="holds weights of test_efficientnet"):
        load({"backend": "timm", "weights": str(tmp_path), "model": "test_vit"})
    with pytest.raises(UserError, match="not weights of the timm model test_vit"):
        load(timm_spec | {"model": "test_vit"})
    with pytest.raises(UserError, match=r"did you mean 'test_efficientnet'\?"):
        load(timm_spec | {"model": "test_eficientnet"})
    (tmp_path / "w.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="with more than tensors"):
        load(timm_spec | {"weights": str(tmp_path / "w.bin")})
    (tmp_path / "cut.safetensors").write_bytes(timm_file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not weights of the timm model"):
        load(timm_spec | {"weights": str(tmp_path / "cut.safetensors")})


def test_open_clip_vectors_are_those_of_open_clip_itself(clip_folder: Path) -> None:
    import open_clip
    import torch

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    image = Image.new("RGB", (50, 40), COLOURS["green"])
    with torch.inference_mode():
        bare = model.encode_image(preprocess(image)[None])[0].numpy()
    spec = {"backend": "open_clip", "model": f"local-dir:{clip_folder}"}
    extractor = load(spec)
    assert extractor.facts()["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    np.testing.assert_allclose(extractor.encode([{"image": encoded(image)}]).embedding[0], bare, atol=1e-5)
    unit = load(spec | {"normalise": True}).encode([{"image": encoded(image)}]).embedding[0]
    np.testing.assert_allclose(unit, bare / np.linalg.norm(bare), atol=1e-5)
    quick = load(spec | {"force_quick_gelu": True}).encode([{"image": encoded(image)}]).embedding[0]
    assert not np.allclose(quick, bare, atol=1e-4)


def test_open_clip_refuses_missing_weights_and_wrong_ones(tmp_path: Path, clip_folder: Path, timm_file: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((clip_folder / "open_clip_config.json").read_bytes())
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        load({"backend": "open_clip", "weights": str(tmp_path)})
    (tmp_path / "open_clip_model.safetensors").write_bytes(timm_file.read_bytes())
    with pytest.raises(UserError, match="not weights of an open_clip model"):
        load({"backend": "open_clip", "weights": str(tmp_path)})
    with pytest.raises(UserError, match="has no such architecture"):
        load({"backend": "open_clip", "model": "ViT-B-33", "weights": str(timm_file)})


@pytest.fixture
def bare_clip(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    """The spec of a file of weights without a description, and the description; open_clip knows the architecture."""
    import open_clip

    description = clip_folder / "open_clip_config.json"
    config = json.loads(description.read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    shutil.copy(clip_folder / "open_clip_model.safetensors", tmp_path / "mine.safetensors")
    return {"backend": "open_clip", "model": "Tiny", "weights": str(tmp_path / "mine.safetensors")}, description


def test_a_description_next_to_a_file_of_weights_is_used(bare_clip: tuple[dict[str, Any], Path]) -> None:
    spec, description = bare_clip
    bare = load(spec)
    assert bare.facts()["preprocessing"]["mean"] == (0.48145466, 0.4578275, 0.40821073)
    neighbour = Path(spec["weights"]).parent / description.name
    neighbour.write_text(description.read_text().replace('"embed_dim"', '"quick_gelu": true, "embed_dim"'))
    described = load(spec)
    assert described.facts()["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    folder = load({"backend": "open_clip", "weights": str(description.parent), "force_quick_gelu": True})
    assert np.array_equal(described.run(IMAGES).embedding, folder.run(IMAGES).embedding)
    assert described.spec.identity() == bare.spec.identity() | {
        "described": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "quick_gelu": True}
    }
    assert load(spec | {"mean": [0.1, 0.1, 0.1]}).facts()["preprocessing"]["mean"] == [0.1, 0.1, 0.1]
    neighbour.write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {"interpolation": "bicubic"}}))
    assert load(spec).spec.identity() == bare.spec.identity()
    neighbour.write_text("{}")
    with pytest.raises(UserError, match=r"open_clip_config\.json: not a description of an open_clip model"):
        load(spec)


def test_a_bare_file_has_the_preprocessing_of_all_known_weights(
    bare_clip: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    known: dict[str, dict[str, Any]] = {}
    published = {
        "webli": open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli"),
        "laion": open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_e16"),
        "openai": open_clip.get_pretrained_cfg("ViT-L-14", "openai"),
    }
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: list(known))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: known[tag])
    spec, _ = bare_clip
    key = extractors.parse_extractor("clip", spec | {"modality": "image"}, "x").identity()
    assert not {"mean", "std", "interpolation", "resize_mode", "described"} & set(key)
    known["webli"] = published["webli"]
    facts = load(spec).facts()["preprocessing"]
    assert facts["mean"] == (0.5, 0.5, 0.5) and facts["resize_mode"] == "squash"
    known.update(published)
    with pytest.raises(
        UserError, match=r"preprocessing of Tiny depends .*or set mean, std, resize_mode according to its model card"
    ):
        load(spec)
    assert load(spec | {"force_quick_gelu": True}).facts()["preprocessing"]["resize_mode"] == "shortest"
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    with pytest.raises(UserError, match="or set resize_mode according"):
        load(spec | half)
    assert load(spec | half | {"resize_mode": "squash"}).facts()["preprocessing"]["resize_mode"] == "squash"


def test_a_bare_file_of_ambiguous_preprocessing_is_refused(timm_file: Path) -> None:
    with pytest.raises(
        UserError, match=r"preprocessing of ViT-L-14 depends .*or set mean, std according to its model card"
    ):
        load({"backend": "open_clip", "model": "ViT-L-14", "weights": str(timm_file)})


@pytest.mark.parametrize("backend", ["timm", "open_clip"])
def test_memory_that_runs_out_while_a_model_loads_is_reported(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    spec = request.getfixturevalue("timm_spec")
    if backend == "open_clip":
        spec = {"backend": backend, "weights": str(request.getfixturevalue("clip_folder"))}
    no_room_on_the_device(monkeypatch)
    with pytest.raises(UserError, match="memory ran out while the model was loaded"):
        load(spec)


def test_the_descriptor_tells_colours_and_shapes_apart() -> None:
    kinds = [(kind, colour) for kind in ("square", "circle") for colour in ("red", "blue", "green", "yellow", "black")]
    images = [shape(kind, colour, seed=seed) for seed in range(3) for kind, colour in kinds]
    vectors = load(DESCRIPTOR).run(images).embedding
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    nearest = (vectors @ vectors.T - 2 * np.eye(len(images))).argmax(axis=1)
    assert [kinds[n % 10] for n in nearest] == kinds * 3


def test_the_descriptor_is_deterministic_whatever_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from extractors.image import descriptor

    here = load(DESCRIPTOR | {"workers": 0}).run(IMAGES * 8 + BAD)
    monkeypatch.setattr(descriptor, "_POOL_PAYS_FROM", 8)
    monkeypatch.setattr(descriptor, "_CHUNK", 5)
    there = load(DESCRIPTOR | {"workers": 2}).run(IMAGES * 8 + BAD)
    assert np.array_equal(here.embedding, there.embedding) and here.errors == there.errors


def test_blank_images_have_a_description() -> None:
    vectors = load(DESCRIPTOR).run([plain(colour) for colour in COLOURS]).embedding
    assert np.isfinite(vectors).all() and len(np.unique(vectors.round(4), axis=0)) == len(COLOURS)


@pytest.mark.parametrize("backend", ["timm", "descriptor"])
def test_real_photos_have_neighbours_of_their_product_type(
    hm: Path, request: pytest.FixtureRequest, backend: str
) -> None:
    spec = DESCRIPTOR
    if backend == "timm":
        weights = request.getfixturevalue("real_weights") / "mobilenetv2_100.safetensors"
        half = [0.5, 0.5, 0.5]
        spec = {
            "backend": "timm",
            "model": "mobilenetv2_100",
            "weights": str(weights),
            "mean": half,
            "std": half,
            "model_kwargs": {"pad_type": "same"},
        }
    with (hm / "items.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:160]
    vectors = load(spec).encode([{"image": hm / row["image"]} for row in rows]).embedding
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (vectors @ vectors.T - 2 * np.eye(len(rows))).argmax(axis=1)
    shared = np.mean([rows[a]["type"] == rows[b]["type"] for a, b in enumerate(nearest)])
    assert shared > 0.35  # 0.06 by chance
