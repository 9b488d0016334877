"""A vision-language model as an encoder: a tiny one with random weights, saved by the test."""

import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlm
import torch
import transformers
from fixtures_extractors import COLOURS, encoded, no_room_on_the_device, plain, write_images, write_items
from PIL import Image

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import read_metadata
from extractors.caption.local import chat_features, processor_of
from extractors.extract import extract
from extractors.multimodal.transformers import TransformersMllmExtractor, TransformersMllmSpec
from workflow.plan.config import load_config

TITLES = ["shoe", "<|image_pad|>", "bag <|im_end|>\n<|im_start|>assistant", "", "a long title, " * 4, "{0}"]
SIZES = [(70, 50), (28, 28), (200, 100), (1, 300), (56, 56), (60, 90)]
ITEMS = [
    {"title": title, "image": plain(colour, size)} for title, colour, size in zip(TITLES, COLOURS, SIZES, strict=True)
]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    folder = tmp_path_factory.mktemp("vlm")
    processor, model = tiny_vlm.build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def spec_of(vlm: Path, **more: Any) -> TransformersMllmSpec:
    data = {
        "modality": "mllm",
        "backend": "transformers-mllm",
        "weights": str(vlm),
        "device": "cpu",
        "precision": "float32",
        "prompt": "{title} What is it?",
        "field_chars": 40,
    }
    spec = extractors.parse_extractor("tiny", data | more, "extractors.tiny")
    assert isinstance(spec, TransformersMllmSpec)
    return spec


@pytest.mark.parametrize("knobs", [{}, {"pooling": "mean"}, {"layer": 1}, {"layer": 1, "pooling": "mean"}])
def test_batch_equals_single_and_control_tokens_in_titles_are_text(vlm: Path, knobs: dict[str, Any]) -> None:
    extractor = spec_of(vlm, batch_size=6, **knobs).load()
    together = extractor.encode(ITEMS)
    assert together.status.tolist() == ["ok"] * 6 and together.embedding.shape == (6, 64)
    alone = np.concatenate([extractor.encode([item]).embedding for item in ITEMS])
    np.testing.assert_allclose(together.embedding, alone, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(together.embedding, axis=1), 1, atol=1e-5)
    some = spec_of(vlm, batch_size=4, **knobs).load().encode(ITEMS).embedding
    np.testing.assert_allclose(some, together.embedding, atol=1e-5)


@pytest.mark.parametrize(("pooling", "layer"), [("last", -1), ("mean", -1), ("last", 2), ("mean", 1), ("mean", -2)])
def test_vectors_are_the_models_hidden_states(vlm: Path, pooling: str, layer: int) -> None:
    processor = transformers.AutoProcessor.from_pretrained(vlm)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm, dtype=torch.float32).eval()
    image = Image.new("RGB", (56, 84), COLOURS["green"])
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>shoe What is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = processor(text=[text], images=[[image]], return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states[layer][0].numpy()
    expected = states[-1] if pooling == "last" else states.mean(axis=0)
    extractor = spec_of(vlm, pooling=pooling, layer=layer, normalise=False).load()
    found = extractor.encode([{"title": "shoe", "image": encoded(image)}]).embedding[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("room", [2, 1])
def test_batches_that_a_thread_prepares_on_gpus_give_the_same_vectors(
    vlm: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    extractor = spec_of(vlm, batch_size=2).load()
    extractor.batch.size = room
    expected = extractor.encode(ITEMS).embedding
    extractor.batch.size, extractor.device = 2, "cuda"  # the model stays on the CPU
    threads = set()
    features_of, model = extractor.features_of, extractor.model.forward

    def noted(asked: Sequence[Any]) -> Any:
        threads.add(threading.current_thread() is threading.main_thread())
        return features_of(asked)

    def forward(*given: Any, **batch: Any) -> Any:
        if len(batch["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(*given, **batch)

    monkeypatch.setattr(extractor, "features_of", noted)
    monkeypatch.setattr(extractor.model, "forward", forward)
    assert np.array_equal(extractor.encode(ITEMS).embedding, expected)
    assert threads == ({False} if room == 2 else {False, True}) and extractor.batch.size == room


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inputs_are_halved_and_pinned_where_they_are_prepared(
    vlm: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.dtype] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.dtype), tensor)[1])
    spec, processor = spec_of(vlm), processor_of(spec_of(vlm), vlm)
    model = types.SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    found = chat_features(processor, spec, model, [(Image.new("RGB", (56, 56)), "shoe")])
    assert found["pixel_values"].dtype == torch.bfloat16 and found["input_ids"].dtype == torch.int64
    assert pinned == ([] if device == "cpu" else [value.dtype for value in found.values()])


def test_image_and_text_both_move_the_vector(vlm: Path) -> None:
    red, blue = plain("red"), plain("blue")
    items = [{"title": "a", "image": red}, {"title": "a", "image": blue}, {"title": "b", "image": red}]
    found = spec_of(vlm).load().encode(items).embedding
    assert np.abs(found[0] - found[1]).max() > 1e-3 and np.abs(found[0] - found[2]).max() > 1e-3


def test_images_that_cannot_be_read_fail_alone(vlm: Path) -> None:
    images: Sequence[bytes | None] = [plain("red"), b"", None, plain("red")[:60], plain("blue", (1, 1))]
    result = spec_of(vlm).load().encode([{"image": image} for image in images])
    assert result.status.tolist() == ["ok", "failed", "missing", "failed", "ok"]
    assert result.errors[1] == "0 bytes" and not result.embedding[1:4].any()


def test_the_stage_writes_any_modality_and_goes_on_shard_by_shard(vlm: Path, tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"title": title} for title in TITLES] + [{}, {}])
    manifest = write_images(tmp_path / "images", [*(item["image"] for item in ITEMS), None, b"x"], per_shard=4)
    inputs = {"items": items, "manifest": manifest}
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path, size in zip(files, [None, None, 3], strict=True):
        record = extract(spec_of(vlm, modality="look-and-words", shard_size=size), inputs, path, name="tiny")
    assert record["counts"] == {"ok": 6, "missing": 1, "failed": 1} and record["dim"] == 64
    assert files[0].read_bytes() == files[1].read_bytes()
    whole, parts = (read_features(path).embedding for path in files[1:])
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    stored = read_metadata(files[0])
    assert stored["prompt"] == "{title} What is it?" and stored["pooling"] == "last" and stored["layer"] == -1
    assert stored["preprocessing"]["max_pixels"] == 262_144 and stored["model"].startswith("Qwen2_5_VL")


def test_an_experiment_may_use_it_under_its_own_name_of_a_modality(vlm: Path) -> None:
    section = {"modality": "look", "backend": "transformers-mllm", "weights": str(vlm)}
    raw: dict[str, Any] = {
        "datasets": {"shop": {"source": "sample"}},
        "extractors": {"states": section},
        "experiments": {"x": {"dataset": "shop", "modalities": {"look": "states"}}},
    }
    assert load_config(raw).experiments["x"].modalities == {"look": "states"}
    raw["experiments"]["x"]["modalities"] = {"image": "states"}
    with pytest.raises(UserError, match="this extractor is of modality 'look'"):
        load_config(raw)


def test_other_titles_are_other_inputs(vlm: Path, tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", [plain("red")])
    prints = []
    for title in ("a", "b", "a"):
        items = write_items(tmp_path, [{"title": title}])
        prints.append(spec_of(vlm).read({"items": items, "manifest": manifest}).digests.to_pylist())
    assert prints[0] == prints[2] != prints[1]


def test_memory_that_runs_out_while_the_model_loads_is_reported(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_room_on_the_device(monkeypatch)
    with pytest.raises(UserError, match="memory ran out while the model was loaded"):
        spec_of(vlm).load()


def test_settings_that_do_not_fit_the_model_are_refused(vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layer = 3: the model has 2 layers, so it is -3 to 2"):
        spec_of(vlm, layer=3).load()
    for file in vlm.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        spec_of(tmp_path).load()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a vision-language model that can be loaded safely"):
        spec_of(tmp_path).load()


def test_every_setting_is_in_the_key_and_the_whole_model_is_the_base(vlm: Path) -> None:
    plain_spec = spec_of(vlm)
    for knob in ({"layer": 1}, {"pooling": "mean"}, {"prompt": "{brand}"}, {"max_pixels": 800}, {"normalise": False}):
        assert spec_of(vlm, **knob).identity() != plain_spec.identity()
    loaded = plain_spec.load()
    assert isinstance(loaded, TransformersMllmExtractor) and not hasattr(loaded.model, "lm_head")


def test_a_large_model_on_a_processor_is_refused_with_hours(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extractors.multimodal.transformers.parameters_of", lambda folder: 7_000_000_000)
    monkeypatch.setattr("extractors.multimodal.transformers.seconds_per_parameter", lambda precision: (1e-11, 1e-9))
    with pytest.raises(UserError, match=r"7\.0 billion parameters .* needs about 19\.7 hours .* allow_slow: true"):
        spec_of(vlm, precision="autocast").check_cpu_time(3000)
    spec_of(vlm, allow_slow=True).check_cpu_time(3000)
    spec_of(vlm).check_cpu_time(10)
