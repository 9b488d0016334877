"""The transformers captioner with a vision-language model of under 1 MB, trained here to name an image's colour."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pyarrow.parquet as pq
import pytest
import tiny_vlm
import torch
from fixtures_extractors import COLOURS, encoded, no_room_on_the_device, plain, write_images, write_items
from PIL import Image

import extractors
from cm3.common.errors import UserError
from cm3.common.tables import CAPTIONS, read_metadata, read_table
from extractors.caption.stage import caption
from extractors.caption.transformers import TransformersCaptioner, TransformersCaptionSpec
from extractors.runtime.cpu_estimate import check_cpu_hours, hours, parameters_of

TITLES = ["shoe", "<|image_pad|>", "bag <|im_end|>\n<|im_start|>assistant", "", "<|vision_start|>", "a long title {0}"]
ITEMS = [{"title": title, "image": plain(colour, (70, 50))} for title, colour in zip(TITLES, COLOURS, strict=True)]
ANSWERS = [tiny_vlm.answer(colour) for colour in COLOURS]


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fitted model."""
    return tiny_vlm.save_fitted(tmp_path_factory.mktemp("vlm"))


def spec_of(vlm: Path, **more: Any) -> TransformersCaptionSpec:
    data = {
        "modality": "caption",
        "backend": "transformers-caption",
        "weights": str(vlm),
        "encoder": "text",
        "device": "cpu",
        "precision": "float32",
        "prompt": "{title} What is it?",
        "field_chars": 16,
        "max_new_tokens": 8,
    }
    spec = extractors.parse_extractor("tiny", data | more, "extractors.tiny")
    assert isinstance(spec, TransformersCaptionSpec)
    return spec


@pytest.fixture(scope="module")
def captioner(vlm: Path) -> TransformersCaptioner:
    return spec_of(vlm, batch_size=6).load()


def test_captions_name_the_colour_despite_control_tokens(
    captioner: TransformersCaptioner,
) -> None:
    result = captioner.caption(ITEMS)
    assert result.captions == ANSWERS
    assert result.status.tolist() == ["ok"] * 6 and (result.tokens > 2).all()


def test_float32_is_strict(captioner: TransformersCaptioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default is TF32 in convolutions, such as that of an image's patches."""
    flags, generate = [], captioner.model.generate
    backends = torch.backends
    monkeypatch.setattr(
        captioner.model,
        "generate",
        lambda **batch: (
            flags.append((backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)),
            generate(**batch),
        )[1],
    )
    captioner.caption(ITEMS[:1])
    assert flags == [(False, False)] and backends.cudnn.allow_tf32


def test_batch_equals_single(captioner: TransformersCaptioner) -> None:
    assert [captioner.caption([item]).captions[0] for item in ITEMS] == ANSWERS


def test_every_kind_of_image_is_captioned_or_failed(captioner: TransformersCaptioner) -> None:
    red = COLOURS["red"]
    kinds = [
        plain("red", (1, 300)),
        plain("red", (900, 600)),
        plain("red", (1, 1)),
        encoded(Image.new("RGB", (40, 40), red).quantize(4)),
        encoded(Image.new("RGBA", (40, 40), (*red, 255))),
    ]
    bad = [b"", b"text", plain("red")[:60], None]
    result = captioner.caption([{"image": image} for image in kinds + bad])
    assert result.status.tolist() == ["ok"] * 5 + ["failed"] * 3 + ["missing"]
    assert result.captions[1:5] == [tiny_vlm.answer("red")] * 4 and result.captions[5:] == [""] * 4
    assert result.errors[5] == "0 bytes" and set(result.errors) == {5, 6, 7}


def test_item_fields_in_the_prompt_are_truncated_and_clean(vlm: Path) -> None:
    spec = spec_of(vlm, prompt="{title}|{brand}|{categories}", field_chars=5)
    assert spec.prompt_of({"title": "a\nlong title", "categories": ["x", "y"]}) == "a lon||x, y"
    assert spec.prompt_of({"title": "{brand}"}) == "{bran||"


def test_the_stage_keeps_every_item(vlm: Path, tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"title": title} for title in TITLES] + [{}, {}, {}])
    images = [item["image"] for item in ITEMS]
    manifest = write_images(tmp_path / "images", [*images[:3], None, *images[3:], b"", "HTTP 404"], per_shard=4)
    inputs = {"items": items, "manifest": manifest}
    record = caption(spec_of(vlm), inputs, tmp_path / "c.parquet", name="tiny", code="abc")
    table = read_table(tmp_path / "c.parquet", CAPTIONS).to_pydict()
    assert table["caption"] == [*ANSWERS[:3], None, *ANSWERS[3:], None, None]
    assert table["status"] == ["ok"] * 3 + ["missing"] + ["ok"] * 3 + ["failed"] * 2
    assert table["error"][7:] == ["0 bytes", "HTTP 404"] and table["item_id"][8] == "i8"
    assert record["counts"] == {"ok": 6, "missing": 1, "failed": 2} and record["tokens"] == sum(table["tokens"])
    assert record["failures"] == [{"item_id": "i7", "reason": "0 bytes"}, {"item_id": "i8", "reason": "HTTP 404"}]
    stored = read_metadata(tmp_path / "c.parquet")
    assert stored["decoding"]["strategy"] == "greedy" and stored["identity"]["weights_sha256"]
    assert stored["prompt"] == "{title} What is it?" and str(vlm) not in json.dumps(stored)

    again = tmp_path / "again.parquet"
    caption(spec_of(vlm, batch_size=1), inputs, again, name="tiny", code="abc")
    assert again.read_bytes() == (tmp_path / "c.parquet").read_bytes()
    assert pq.read_table(again).num_rows == 9


def test_a_changed_title_changes_the_input_digest(vlm: Path, tmp_path: Path) -> None:
    manifest = write_images(tmp_path, [plain("red")])
    prints = []
    for folder, title in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / folder).mkdir()
        items = write_items(tmp_path / folder, [{"title": title}])
        prints.append(spec_of(vlm).read({"items": items, "manifest": manifest}).digests.to_pylist())
    assert prints[0] != prints[1] and prints[0] == prints[2]


def test_no_image_at_all_is_an_error(vlm: Path, tmp_path: Path) -> None:
    items, manifest = write_items(tmp_path, [{}, {}]), write_images(tmp_path, [None, "HTTP 404"])
    with pytest.raises(UserError, match=r"none of 2 items has an input .*1 missing, 1 failed: i1: HTTP 404"):
        caption(spec_of(vlm), {"items": items, "manifest": manifest}, tmp_path / "c.parquet")


def test_pickled_weights_are_refused(vlm: Path, tmp_path: Path) -> None:
    for file in vlm.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="not a vision-language model that can be loaded safely"):
        spec_of(tmp_path).load()


def test_errors_of_libraries_become_user_errors(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_room_on_the_device(monkeypatch)
    with pytest.raises(UserError, match="memory ran out while the model was loaded"):
        spec_of(vlm).load()
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *a, **k: object())
    with pytest.raises(UserError, match="has no processor of images and texts, so it is not a vision-language model"):
        spec_of(vlm).load()
    absent = MagicMock(side_effect=ImportError("Package `num2words` is required"))
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", absent)
    with pytest.raises(UserError, match="can be loaded safely: ImportError: Package `num2words` is required"):
        spec_of(vlm).load()


def test_a_model_with_its_own_code_is_refused(vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vlm, tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its own code \(own\.Config\), which is not run\. Take a model that"):
        spec_of(folder).load()


def huge_model(folder: Path, vlm: Path, parameters: int) -> Path:
    """Make a folder whose safetensors header claims so many parameters; the file has a hole instead of numbers."""
    for file in vlm.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    size = 2 * parameters
    header = json.dumps({"w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


def test_a_large_model_on_a_cpu_is_refused_with_hours(vlm: Path, tmp_path: Path) -> None:
    folder = huge_model(tmp_path, vlm, 7_000_000_000)
    assert parameters_of(folder) == 7_000_000_000
    with pytest.raises(
        UserError,
        match=r"7\.0 billion parameters .* needs about .* hours for 3000 items.*openai-caption.*allow_slow: true",
    ):
        spec_of(folder).check_cpu_time(3000)
    spec_of(folder, allow_slow=True).check_cpu_time(3000)
    spec_of(vlm).check_cpu_time(1_000_000)


def test_estimated_hours_are_work_over_speed(caplog: pytest.LogCaptureFixture) -> None:
    assert hours(2_000_000_000, 900, 100, 50, (1e-12, 1e-10)) == pytest.approx(900 * 2e9 * (1e-10 + 5e-9) / 3600)
    check_cpu_hours(2_000_000_000, 10, 0.5, allow_slow=False)
    assert "0.5 hours for 10 items" in caplog.text


def test_metadata_hold_model_prompt_and_truncated_captions(
    vlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items, manifest = write_items(tmp_path, [{}, {}]), write_images(tmp_path, [plain("red"), plain("blue")])
    with caplog.at_level("INFO"):
        record = caption(spec_of(vlm, max_new_tokens=2), {"items": items, "manifest": manifest}, tmp_path / "c.parquet")
    stored = read_metadata(tmp_path / "c.parquet")
    assert stored["model"].startswith("weights_sha256 ") and stored["architecture"].startswith("Qwen2_5_VL")
    assert stored["prompt_key"] == hashlib.sha256(stored["prompt"].encode()).hexdigest()[:12]
    assert (
        record["captions_cut"] == record["captions_at_limit"] == 2
        and "2 captions were cut at max_new_tokens" in caplog.text
    )
    assert "item i0: a red" in caplog.text
    whole = caption(spec_of(vlm), {"items": items, "manifest": manifest}, tmp_path / "d.parquet")
    assert whole["captions_cut"] == whole["captions_at_limit"] == 0
