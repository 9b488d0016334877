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
from fixtures_extractors import COLOURS, encoded, plain, shape, write_items, write_pictures
from PIL import Image
from torchvision.transforms import v2

import extractors
from cm3.common.errors import UserError
from cm3.common.tables import read_features, read_metadata
from extractors.extract import extract
from extractors.image.transformers import TransformersVisionExtractor

PICTURES = [
    shape(kind, colour, 64, seed) for seed in range(3) for kind, colour in (("square", "red"), ("circle", "blue"))
]
KINDS = list(tiny_transformers.vision_models())
POOLINGS = ("model", "cls", "mean")
WITHOUT_CLASS = ("siglip", "resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by kind."""
    return {kind: tiny_transformers.save_vision(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def load(folder: Path, **more: Any) -> TransformersVisionExtractor:
    spec = {"modality": "image", "backend": "transformers-vision", "weights": str(folder), "device": "cpu"}
    loaded = extractors.load(spec | more)
    assert isinstance(loaded, TransformersVisionExtractor)
    return loaded


def pixels(picture: Image.Image) -> torch.Tensor:
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
    return steps(picture)


def bare(folder: Path, kind: str, pooling: str, picture: Image.Image) -> np.ndarray:
    """Return a picture's vector by the library alone, each kind by hand."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    before = {"dinov2-registers": 4}.get(kind, 0 if kind in WITHOUT_CLASS else 1)
    with torch.inference_mode():
        if kind in ("clip", "siglip"):
            output = model.vision_model(pixel_values=pixels(picture)[None])
            own = model.visual_projection(output.pooler_output) if kind == "clip" else output.pooler_output
        else:
            output = model(pixel_values=pixels(picture)[None])
            own = output.pooler_output
        states = output.last_hidden_state
        states = states.flatten(2).transpose(1, 2) if kind == "resnet" else states
    found = {"model": own.flatten(1), "cls": states[:, 0], "mean": states[:, before:].mean(1)}
    return found[pooling][0].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_the_library_itself(folders: dict[str, Path], kind: str, pooling: str) -> None:
    if pooling == "cls" and kind in WITHOUT_CLASS:
        with pytest.raises(UserError, match="has no class token; set pooling: model or mean"):
            load(folders[kind], pooling=pooling)
        return
    random = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    picture = Image.fromarray(random)
    extractor = load(folders[kind], pooling=pooling)
    found = extractor.encode([{"picture": encoded(picture)}, {"picture": PICTURES[0]}]).embedding
    np.testing.assert_allclose(found[0], bare(folders[kind], kind, pooling, picture), atol=1e-4)
    assert extractor.dim == found.shape[1] and not np.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_batch_equals_single_whatever_the_batch_size_and_workers(folders: dict[str, Path], kind: str) -> None:
    extractor = load(folders[kind])
    alone = np.concatenate([extractor.run([picture]).embedding for picture in PICTURES])
    for batch in (2, 6):
        found = load(folders[kind], batch_size=batch, workers=batch).run(PICTURES).embedding
        np.testing.assert_allclose(found, alone, atol=1e-5)
        assert np.array_equal(found, load(folders[kind], batch_size=batch, workers=1).run(PICTURES).embedding)
    unit = load(folders[kind], normalise=True).run(PICTURES).embedding
    np.testing.assert_allclose(unit, alone / np.linalg.norm(alone, axis=1, keepdims=True), atol=1e-5)


def test_an_image_tower_saved_with_its_projection_keeps_it(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = transformers.CLIPModel.from_pretrained(folders["clip"])
    whole.config.vision_config.projection_dim = 16
    tower = transformers.CLIPVisionModelWithProjection(whole.config.vision_config)
    tower.vision_model.load_state_dict(whole.vision_model.state_dict())
    tower.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    tower.save_pretrained(tmp_path)
    shutil.copy(folders["clip"] / "preprocessor_config.json", tmp_path)
    expected = load(folders["clip"]).run(PICTURES).embedding
    np.testing.assert_allclose(load(tmp_path).run(PICTURES).embedding, expected, atol=1e-5)
    cls = load(tmp_path, pooling="cls").run(PICTURES).embedding
    np.testing.assert_allclose(cls, load(folders["clip"], pooling="cls").run(PICTURES).embedding, atol=1e-5)


def turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, "JPEG", exif=exif, quality=95)


def test_pictures_of_every_kind_have_a_vector_or_a_reason(folders: dict[str, Path]) -> None:
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
    bad = [b"", b"text", PICTURES[0][:900], PICTURES[0][:300] + bytes(300)]
    found = extractor.encode([{"picture": picture} for picture in [*kinds.values(), *bad]] + [{}])
    assert found.status.tolist()[: len(kinds)] == ["ok"] * len(kinds) and found.status[-1] == "missing"
    assert found.status[len(kinds)] == found.status[len(kinds) + 1] == "failed" and "0 bytes" in found.errors.values()
    assert np.isfinite(found.embedding).all()
    vectors = dict(zip(kinds, found.embedding, strict=False))
    # A red picture is one whatever its shape; libraries take a height of 1 or 3 for channels.
    for same in ("high", "wide", "three", "three high", "palette"):
        np.testing.assert_allclose(vectors[same], vectors["dot"], atol=1e-4)
    white = extractor.run([plain("white", (9, 9)), encoded(Image.new("RGB", (9, 9), "white"))]).embedding[1]
    np.testing.assert_allclose(vectors["clear"], white, atol=1e-4)


def test_exif_turns_the_picture(folders: dict[str, Path]) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((200, 0, 0), (0, 0, 64, 20))
    found = load(folders["clip"]).run([turned(picture), encoded(picture.rotate(-90)), encoded(picture)]).embedding
    assert np.abs(found[0] - found[1]).max() < 0.2 * np.abs(found[0] - found[2]).max()


def test_preprocessing_is_the_models_own_and_recorded(folders: dict[str, Path], tmp_path: Path) -> None:
    items = write_items(tmp_path, [{}] * 3)
    manifest = write_pictures(tmp_path / "images", [PICTURES[0], None, b"x"])
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
    expected = load(folders["vit"], pooling="cls").run(PICTURES).embedding
    assert np.array_equal(load(headless, pooling="cls").run(PICTURES).embedding, expected)


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
    with pytest.raises(UserError, match="its preprocessing leaves pictures in different sizes"):
        load(tmp_path / "loose")
