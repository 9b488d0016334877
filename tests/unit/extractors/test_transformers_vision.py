"""Vision models of transformers, small random ones saved by the test."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
import transformers
from fixtures_extractors import COLOURS, encoded, plain, shape, write_images, write_items
from PIL import Image
from torchvision.transforms import v2

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import read_metadata
from extractors.extract import extract
from extractors.image.transformers import TransformersVisionExtractor

IMAGES = [
    shape(kind, colour, 64, seed) for seed in range(3) for kind, colour in (("square", "red"), ("circle", "blue"))
]
KINDS = list(tiny_transformers.vision_models())
POOLINGS = ("model", "cls", "mean")
WITHOUT_CLASS = ("siglip", "siglip2-naflex", "resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by kind."""
    return {kind: tiny_transformers.save_vision(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def load(folder: Path, **more: Any) -> TransformersVisionExtractor:
    spec = {"modality": "image", "backend": "transformers-vision", "weights": str(folder), "device": "cpu"}
    loaded = extractors.load(spec | more)
    assert isinstance(loaded, TransformersVisionExtractor)
    return loaded


def pixels(image: Image.Image) -> torch.Tensor:
    """Return CLIP's preprocessing written out: short side to 32, centre cut out, 0..1, normalised."""
    side = tiny_transformers.SIDE
    steps = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(side, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(side),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]),
        ]
    )
    return steps(image)


def bare(folder: Path, kind: str, pooling: str, image: Image.Image) -> np.ndarray:
    """Return an image's vector by the library alone, each kind by hand."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    if kind == "siglip2-naflex":
        return bare_naflex(model, folder, pooling, image)
    before = {"dinov2-registers": 4, "dinov3": 5}.get(kind, 0 if kind in WITHOUT_CLASS else 1)
    with torch.inference_mode():
        if kind in ("clip", "siglip"):
            output = model.vision_model(pixel_values=pixels(image)[None])
            own = model.visual_projection(output.pooler_output) if kind == "clip" else output.pooler_output
        else:
            output = model(pixel_values=pixels(image)[None])
            own = output.pooler_output
        states = output.last_hidden_state
        states = states.flatten(2).transpose(1, 2) if kind == "resnet" else states
    found = {"model": own.flatten(1), "cls": states[:, 0], "mean": states[:, before:].mean(1)}
    return found[pooling][0].numpy()


def bare_naflex(model: Any, folder: Path, pooling: str, image: Image.Image) -> np.ndarray:
    inputs = transformers.AutoImageProcessor.from_pretrained(folder, backend="torchvision")(
        images=image, return_tensors="pt"
    )
    assert inputs["pixel_attention_mask"].sum() < 14, "an image whose patches are padded"
    with torch.inference_mode():
        output = model.vision_model(**inputs)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    states = output.last_hidden_state[0, : rows * columns]
    return (output.pooler_output[0] if pooling == "model" else states.mean(0)).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_the_library_itself(folders: dict[str, Path], kind: str, pooling: str) -> None:
    if pooling == "cls" and kind in WITHOUT_CLASS:
        with pytest.raises(UserError, match="has no class token; set pooling: model or mean"):
            load(folders[kind], pooling=pooling)
        return
    random = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    image = Image.fromarray(random)
    extractor = load(folders[kind], pooling=pooling)
    found = extractor.encode([{"image": encoded(image)}, {"image": IMAGES[0]}]).embedding
    np.testing.assert_allclose(found[0], bare(folders[kind], kind, pooling, image), atol=1e-4)
    assert extractor.dim == found.shape[1] and not np.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2-naflex", "dinov2", "dinov3"])
def test_batch_equals_single_whatever_the_batch_size_and_workers(folders: dict[str, Path], kind: str) -> None:
    extractor = load(folders[kind])
    alone = np.concatenate([extractor.run([image]).embedding for image in IMAGES])
    for batch in (2, 6):
        found = load(folders[kind], batch_size=batch, workers=batch).run(IMAGES).embedding
        np.testing.assert_allclose(found, alone, atol=1e-5)
        assert np.array_equal(found, load(folders[kind], batch_size=batch, workers=1).run(IMAGES).embedding)
    unit = load(folders[kind], normalise=True).run(IMAGES).embedding
    np.testing.assert_allclose(unit, alone / np.linalg.norm(alone, axis=1, keepdims=True), atol=1e-5)


def test_an_image_tower_saved_with_its_projection_keeps_it(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = transformers.CLIPModel.from_pretrained(folders["clip"])
    whole.config.vision_config.projection_dim = 16
    tower = transformers.CLIPVisionModelWithProjection(whole.config.vision_config)
    tower.vision_model.load_state_dict(whole.vision_model.state_dict())
    tower.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    tower.save_pretrained(tmp_path)
    shutil.copy(folders["clip"] / "preprocessor_config.json", tmp_path)
    expected = load(folders["clip"]).run(IMAGES).embedding
    np.testing.assert_allclose(load(tmp_path).run(IMAGES).embedding, expected, atol=1e-5)
    cls = load(tmp_path, pooling="cls").run(IMAGES).embedding
    np.testing.assert_allclose(cls, load(folders["clip"], pooling="cls").run(IMAGES).embedding, atol=1e-5)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=95)


def test_images_of_every_kind_have_a_vector_or_a_reason(folders: dict[str, Path]) -> None:
    red, extractor = COLOURS["red"], load(folders["clip"])
    frames = [Image.new("P", (20, 20), number) for number in range(3)]
    kinds = {
        "dot": plain("red", (1, 1)),
        "high": plain("red", (1, 300)),
        "wide": plain("red", (300, 1)),
        "three": plain("red", (3, 3)),
        "three high": plain("red", (50, 3)),
        "cmyk": encoded(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG"),
        "palette": encoded(Image.new("RGB", (40, 40), red).quantize(4)),
        "sixteen": encoded(Image.fromarray(np.full((40, 40), 51_400, np.uint16))),
        "clear": encoded(Image.new("RGBA", (40, 40), (*red, 0))),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "exif": turned(Image.new("RGB", (60, 30), red)),
    }
    bad = [b"", b"text", IMAGES[0][:900], IMAGES[0][:300] + bytes(300)]
    found = extractor.encode([{"image": image} for image in [*kinds.values(), *bad]] + [{}])
    assert found.status.tolist()[: len(kinds)] == ["ok"] * len(kinds) and found.status[-1] == "missing"
    assert found.status[len(kinds)] == found.status[len(kinds) + 1] == "failed" and "0 bytes" in found.errors.values()
    assert np.isfinite(found.embedding).all()
    vectors = dict(zip(kinds, found.embedding, strict=False))
    # A red image is one whatever its shape; libraries take a height of 1 or 3 for channels.
    for same in ("high", "wide", "three", "three high", "palette"):
        np.testing.assert_allclose(vectors[same], vectors["dot"], atol=1e-4)
    white = extractor.run([plain("white", (9, 9)), encoded(Image.new("RGB", (9, 9), "white"))]).embedding[1]
    np.testing.assert_allclose(vectors["clear"], white, atol=1e-4)


def test_exif_turns_the_image(folders: dict[str, Path]) -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((200, 0, 0), (0, 0, 64, 20))
    found = load(folders["clip"]).run([turned(image), encoded(image.rotate(-90)), encoded(image)]).embedding
    assert np.abs(found[0] - found[1]).max() < 0.2 * np.abs(found[0] - found[2]).max()


def test_preprocessing_is_the_models_own_and_recorded(folders: dict[str, Path], tmp_path: Path) -> None:
    items = write_items(tmp_path, [{}] * 3)
    manifest = write_images(tmp_path / "images", [IMAGES[0], None, b"x"])
    data = {"modality": "image", "backend": "transformers-vision", "weights": str(folders["vit"]), "pooling": "cls"}
    spec = extractors.parse_extractor("tiny", data | {"device": "cpu"}, "extractors.tiny")
    extract(spec, {"items": items, "manifest": manifest}, tmp_path / "f.parquet")
    assert read_features(tmp_path / "f.parquet").status.tolist() == ["ok", "missing", "failed"]
    stored = read_metadata(tmp_path / "f.parquet")
    used = stored["preprocessing"]
    assert used["image_mean"] == [0.5, 0.4, 0.3] and used["crop_size"] == {"height": 32, "width": 32}
    assert used["processor"] == "CLIPImageProcessor" and "torchvision" in used["library"]
    assert stored["model"] == "ViTModel" and stored["pooling"] == "cls"


def without(folder: Path, source: Path, prefix: str) -> Path:
    """Copy a model, leaving out weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_random_pooler_is_never_used(folders: dict[str, Path], tmp_path: Path) -> None:
    headless = without(tmp_path / "vit", folders["vit"], "pooler.")
    with pytest.raises(UserError, match=r"2 tensors of ViTModel, .*: pooler\.dense\.bias is not in the checkpoint"):
        load(headless)
    expected = load(folders["vit"], pooling="cls").run(IMAGES).embedding
    assert np.array_equal(load(headless, pooling="cls").run(IMAGES).embedding, expected)


def test_what_is_no_vision_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    text = tiny_transformers.save_text("bert", tmp_path / "bert")
    with pytest.raises(UserError, match=r"not a vision model with preprocessor_config\.json"):
        load(text)
    shutil.copy(folders["vit"] / "preprocessor_config.json", text)
    with pytest.raises(UserError, match=r"not an image encoder that takes pixels alone \(BertModel\)"):
        load(text)
    shutil.copytree(folders["dinov2"], tmp_path / "other")
    shutil.copy(folders["vit"] / "config.json", tmp_path / "other" / "config.json")
    with pytest.raises(UserError, match=r"\d+ tensors of ViTModel, which its config\.json names, don't fit"):
        load(tmp_path / "other")
    shutil.copytree(folders["vit"], tmp_path / "loose")
    settings = json.loads((tmp_path / "loose" / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (tmp_path / "loose" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its preprocessing gives images of different sizes"):
        load(tmp_path / "loose")
