"""Slabs give the vectors of the ordinary way to the bit, and are filled by threads while earlier ones are computed on."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
from fake_device import Launches, fake_device, moved
from fixtures_extractors import shape
from PIL import Image

import extractors
from extractors.image.base import ImageModel
from extractors.runtime.slabs import Download, Slab
from extractors.text.pooling import pool

CPU = torch.device("cpu")
IMAGES = [shape(kind, colour, seed=n) for n in range(6) for kind in ("square", "circle") for colour in ("red", "blue")]
MIXED = [b"text", *IMAGES[:5], b"", b"", *IMAGES[5:], IMAGES[0][:900]]


def timm_spec(folder: Path) -> dict[str, Any]:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), folder / "tiny.safetensors")
    weights = str(folder / "tiny.safetensors")
    return {"backend": "timm", "model": "test_efficientnet", "weights": weights, "input_size": 64}


def open_clip_spec(folder: Path) -> dict[str, Any]:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    save_file(model.state_dict(), folder / "clip.safetensors")
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.21, 0.22], "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"backend": "open_clip", "model": "ViT-S-32-alt", "weights": str(folder / "clip.safetensors")} | given


def transformers_spec(folder: Path, kind: str) -> dict[str, Any]:
    return {"backend": "transformers-vision", "weights": str(tiny_transformers.save_vision(kind, folder))}


SPECS = {
    "timm": timm_spec,
    "open_clip": open_clip_spec,
    "clip": lambda folder: transformers_spec(folder, "clip"),
    "siglip2-naflex": lambda folder: transformers_spec(folder, "siglip2-naflex"),
    "dinov2": lambda folder: transformers_spec(folder, "dinov2"),
}


def load(spec: dict[str, Any], **more: Any) -> ImageModel:
    model = extractors.load({"modality": "image", "device": "cpu", "batch_size": 4} | spec | more)
    assert isinstance(model, ImageModel) and not model.uses_slabs, "on a CPU nothing changes"
    return model


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("workers", [1, 4])
def test_slabs_give_the_same_vectors_and_reasons(tmp_path: Path, name: str, workers: int):
    model = load(SPECS[name](tmp_path), workers=workers, normalise=True)
    expected = model.run(MIXED)
    model.uses_slabs = True
    seen: list[tuple[int, int, int]] = []
    found = model.run(MIXED, lambda n, ok=0, failed=0: seen.append((n, ok, failed)))
    assert np.array_equal(found.embedding, expected.embedding)
    assert found.status.tolist() == expected.status.tolist() and found.errors == expected.errors
    assert np.sum(seen, axis=0).tolist() == [len(MIXED), len(MIXED) - 4, 4]


@pytest.mark.parametrize("name", ["open_clip", "clip", "dinov2"])
def test_threads_write_uint8_and_the_device_normalises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    types = set()
    write = Slab.write
    monkeypatch.setattr(Slab, "write", lambda slab, row, one: (types.add(one.dtype), write(slab, row, one))[1])
    model = load(SPECS[name](tmp_path))
    model.uses_slabs = True
    model.run(IMAGES)
    assert types == {torch.uint8}


def test_a_processor_that_normalises_otherwise_prepares_on_the_cpu(tmp_path: Path):
    model = load(open_clip_spec(tmp_path))
    expected = model.run(IMAGES).embedding
    model.uses_slabs = True
    model.normalised = lambda stack: stack.float()  # type: ignore[method-assign]
    assert np.array_equal(model.run(IMAGES).embedding, expected)


def test_memory_that_runs_out_halves_the_batches_of_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(timm_spec(tmp_path))
    expected = model.run(MIXED)
    small = model.forward

    def forward(stack: torch.Tensor) -> torch.Tensor:
        if len(stack) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return small(stack)

    model.uses_slabs = True
    monkeypatch.setattr(model, "forward", forward)
    found = model.run(MIXED)
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-5)
    assert found.errors == expected.errors and model.batch.size == 1


def test_images_are_decoded_while_the_device_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first batch waits in the model until threads have decoded two more: otherwise the wait ends in an error."""
    model = load(timm_spec(tmp_path), workers=2)
    model.uses_slabs = True
    decoded, later = [0], threading.Event()
    prepare, forward = model.prepare, model.forward

    def counted(image: Image.Image) -> torch.Tensor:
        decoded[0] += 1
        if decoded[0] >= 3 + 3 * 4:  # three calls find the shape and compare
            later.set()
        return prepare(image)

    def waiting(stack: torch.Tensor) -> torch.Tensor:
        assert later.wait(120)
        return forward(stack)

    monkeypatch.setattr(model, "prepare", counted)
    monkeypatch.setattr(model, "pixels", counted)
    monkeypatch.setattr(model, "forward", waiting)
    assert (model.run(IMAGES).status == "ok").all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["timm", "open_clip", "clip", "dinov2"])
def test_a_batch_of_images_does_not_wait_for_the_device(tmp_path: Path, name: str, precision: str):
    """The positions of a NaFlex model do: transformers computes them on the host."""
    model = load(SPECS[name](tmp_path), precision=precision)
    pixels = model.pixels(Image.new("RGB", (40, 60), "red")).expand(3, -1, -1, -1)
    with fake_device():
        moved(model.model, "cuda")
        model.device = "cuda"
        for attribute, value in vars(model).items():
            if isinstance(value, torch.Tensor):
                setattr(model, attribute, moved(value, "cuda"))
        # The first call makes constants. Before it, `normalised` is compared with `prepare` on the CPU.
        for device in ("cpu", "cuda") if name == "open_clip" else ("cuda",):
            assert model.normalised(moved(pixels, device)).device.type == device
        stack = moved(pixels, "cuda")
        with torch.inference_mode(), Launches("cuda"):
            vectors = model.vectors_of(model.normalised(stack))
        assert vectors.device.type == "cuda" and vectors.shape == (3, model.dim)


@pytest.mark.parametrize("kind", ["bert", "qwen"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_batch_of_texts_does_not_wait_for_the_device(tmp_path: Path, kind: str, pooling: str):
    folder = str(tiny_transformers.save_text(kind, tmp_path))
    spec = {"modality": "text", "backend": "transformers-text", "weights": folder, "pooling": pooling, "device": "cpu"}
    model: Any = extractors.load(spec)
    with fake_device():
        moved(model.model, "cuda")
        ids, mask = (torch.empty(3, 5, dtype=torch.int64, device="cuda") for _ in range(2))
        with torch.inference_mode(), Launches("cuda"):
            states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            vectors = pool(states.float(), mask, pooling)
        assert vectors.device.type == "cuda" and vectors.shape == (3, model.dim)


def test_a_slab_returns_the_rows_asked_for_and_may_be_filled_anew():
    slab = Slab(5, torch.zeros(2, 3, dtype=torch.uint8), CPU)
    for row in range(5):
        slab.write(row, torch.full((2, 3), row, dtype=torch.uint8))
    some = slab.upload([1, 2, 4])
    slab.wait()
    slab.write(1, torch.full((2, 3), 9, dtype=torch.uint8))
    assert some.shape == (3, 2, 3) and some[:, 0, 0].tolist() == [1, 2, 4]
    assert Download(some.float()).wait()[:, 1, 2].tolist() == [1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match=r"different shapes: \(2, 3\) and \(3, 3\)"):
        slab.write(0, torch.zeros(3, 3, dtype=torch.uint8))
