"""The extract stage: nothing lost, nothing guessed, the same file whatever interrupts it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import plain, shape, write_images, write_items

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import read_metadata
from extractors.extract import extract
from extractors.extractor import Model
from extractors.image.item_images import read_images
from extractors.runtime.batch import Batch

DESCRIPTOR = {"modality": "image", "backend": "descriptor"}
IMAGES = [
    shape(kind, colour, 64, seed) for seed in range(5) for kind, colour in (("square", "red"), ("circle", "blue"))
]


def descriptor(**more: Any) -> Any:
    return extractors.parse_extractor("look", DESCRIPTOR | {"workers": 1} | more, "extractors.look")


def tables(folder: Path, images: list[bytes | str | None], per_shard: int = 5) -> dict[str, Path]:
    return {
        "items": write_items(folder, [{}] * len(images)),
        "manifest": write_images(folder / "images", images, per_shard),
    }


def test_every_item_has_a_row_a_status_and_a_reason(tmp_path: Path) -> None:
    inputs = tables(tmp_path, [IMAGES[0], None, b"", IMAGES[1], "HTTP 404", b"text", IMAGES[2]], per_shard=2)
    record = extract(descriptor(), inputs, tmp_path / "f.parquet", name="look", code="abc")
    features = read_features(tmp_path / "f.parquet", [f"i{row}" for row in range(7)])
    assert features.status.tolist() == ["ok", "missing", "failed", "ok", "failed", "failed", "ok"]
    assert record["counts"] == {"ok": 3, "missing": 1, "failed": 3}
    assert [one["item_id"] for one in record["failures"]] == ["i2", "i4", "i5"]
    assert [one["reason"] for one in record["failures"]][:2] == ["0 bytes", "HTTP 404"]
    alone = descriptor().load().run([IMAGES[0], IMAGES[1], IMAGES[2]]).embedding
    assert np.array_equal(features.embedding[[0, 3, 6]], alone) and not features.embedding[[1, 2, 4, 5]].any()
    stored = read_metadata(tmp_path / "f.parquet")
    assert stored["identity"]["scikit_image_version"] and stored["preprocessing"] and stored["code"] == "abc"
    assert [path.name for path in tmp_path.glob(".f*")] == []


def test_images_follow_their_items_when_shards_hold_them_in_another_order(tmp_path: Path) -> None:
    import pyarrow as pa

    from cm3.common.tables import MANIFEST, read_table, write_table

    inputs = tables(tmp_path, IMAGES[:6], per_shard=4)
    manifest = read_table(inputs["manifest"], MANIFEST).to_pydict()
    order = [4, 2, 5, 0, 3, 1]
    moved = {k: v if k == "item_id" else [v[place] for place in order] for k, v in manifest.items()}
    write_table(inputs["manifest"], pa.table(moved, schema=MANIFEST), MANIFEST)
    extract(descriptor(), inputs, tmp_path / "f.parquet")
    expected = descriptor().load().run([IMAGES[place] for place in order]).embedding
    assert np.array_equal(read_features(tmp_path / "f.parquet").embedding, expected)


def test_the_same_file_comes_out_for_any_shard_size_and_workers(tmp_path: Path) -> None:
    inputs = tables(tmp_path, [*IMAGES, b"", None])
    extract(descriptor(), inputs, tmp_path / "one.parquet")
    extract(descriptor(workers=2, shard_size=3), inputs, tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_failure_in_the_middle_keeps_the_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from extractors.image.descriptor import DescriptorExtractor, DescriptorSpec

    inputs, output = tables(tmp_path, list(IMAGES)), tmp_path / "f.parquet"
    monkeypatch.setattr(DescriptorSpec, "shard_items", 4)
    run = DescriptorExtractor.run
    seen: list[int] = []
    asked: list[int] = []
    monkeypatch.setattr(DescriptorSpec, "check_cpu_time", lambda self, items: asked.append(items))

    def counted(self: Any, images: Any, advance: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise OSError("the disk went away")
        return run(self, images, advance)

    monkeypatch.setattr(DescriptorExtractor, "run", counted)
    with pytest.raises(OSError, match="went away"):
        extract(descriptor(), inputs, output, code="a")
    assert not output.exists() and len(list(tmp_path.glob(".f.parquet.shards-*/*.parquet"))) == 2
    with caplog.at_level(logging.INFO):
        record = extract(descriptor(), inputs, output, code="a")
    assert "resuming: 2 of 3 shards are finished" in caplog.text and len(seen) == 4
    assert asked == [10, 2]
    assert record["counts"]["ok"] == 10 and not list(tmp_path.glob(".f.parquet.shards-*"))


@pytest.mark.parametrize("change", ["version", "settings", "images"])
def test_shards_of_another_version_setting_or_input_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from extractors.image.descriptor import DescriptorExtractor, DescriptorSpec

    monkeypatch.setattr(DescriptorSpec, "shard_items", 4)
    inputs, output = tables(tmp_path, list(IMAGES)), tmp_path / "f.parquet"
    with monkeypatch.context() as broken:
        broken.setattr("extractors.extract.write_features", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(descriptor(), inputs, output, code="a")
    if change == "images":
        inputs = tables(tmp_path, [shape("square", "green", 64, seed) for seed in range(10)])
    seen: list[int] = []
    run = DescriptorExtractor.run
    monkeypatch.setattr(DescriptorExtractor, "run", lambda self, *args: (seen.append(1), run(self, *args))[1])
    spec = descriptor(dtype="float16") if change == "settings" else descriptor()
    extract(spec, inputs, output, code="b" if change == "version" else "a")
    assert len(seen) == 3 and not list(tmp_path.glob(".f.parquet.shards-*"))


def stage(folder: Path, inputs: dict[str, Path], output: Path, shard: int) -> subprocess.Popen[str]:
    """Start the stage as Snakemake does, with small shards."""
    driver = (
        "from extractors.image.descriptor import DescriptorSpec\nfrom extractors.extract import main\n"
        f"DescriptorSpec.shard_items = {shard}\nif __name__ == '__main__': main()\n"
    )
    (folder / "driver.py").write_text(driver)
    spec = {"name": "look", "settings": DESCRIPTOR, "identity": descriptor().identity()}
    command = [
        sys.executable,
        str(folder / "driver.py"),
        "--spec",
        json.dumps(spec),
        "--runtime",
        '{"threads": 1}',
        "--input",
        f"items={inputs['items']}",
        "--input",
        f"manifest={inputs['manifest']}",
        "--output",
        f"features={output}",
        "--output",
        f"record={output}.json",
        "--code",
        "abc",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(extractors.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.integration
def test_a_killed_job_goes_on_where_it_was_and_gives_identical_bytes(tmp_path: Path) -> None:
    images: list[bytes | str | None] = [shape("circle", "green", 32 + row, row) for row in range(400)]
    images += [b"not an image %d" % row for row in range(40)] + [None] * 40
    inputs = tables(tmp_path, images, per_shard=100)
    whole = tmp_path / "whole" / "f.parquet"
    assert stage(tmp_path, inputs, whole, 10).wait() == 0

    output = tmp_path / "killed" / "f.parquet"
    for _ in range(10):  # A busy machine may count the shards too late, when the job has ended.
        process = stage(tmp_path, inputs, output, 10)
        while len(list(output.parent.glob(".f.parquet.shards-*/*[0-9].parquet"))) < 5 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not output.exists():
            break
        shutil.rmtree(output.parent)
    assert not output.exists()
    finished = len(list(output.parent.glob(".f.parquet.shards-*/*[0-9].parquet")))
    assert 5 <= finished < 44

    process = stage(tmp_path, inputs, output, 10)
    log = process.communicate()[1]
    assert process.returncode == 0 and f"{finished} of 44 shards are finished" in log
    assert output.read_bytes() == whole.read_bytes()
    record = json.loads(Path(f"{output}.json").read_text())
    assert record["counts"] == {"ok": 400, "missing": 40, "failed": 40} and len(record["failures"]) == 20
    assert record["stage"] == "extractors.extract" and record["code"] == "abc" and record["peak_memory_mb"] > 0


def test_a_model_that_is_not_the_planned_one_is_refused(tmp_path: Path) -> None:
    inputs = tables(tmp_path, [IMAGES[0]])
    spec = {"name": "look", "settings": DESCRIPTOR, "identity": {"scikit_image_version": "0.0.1"}}
    command = [
        sys.executable,
        "-m",
        "extractors.extract",
        "--spec",
        json.dumps(spec),
        "--input",
        f"items={inputs['items']}",
        "--input",
        f"manifest={inputs['manifest']}",
        "--output",
        f"features={tmp_path / 'f.parquet'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(extractors.__file__).parents[1])
    assert done.returncode == 1 and "planned with '0.0.1'" in done.stderr and "Traceback" not in done.stderr


def test_nan_from_a_model_is_refused_and_the_items_are_named(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    data = {"modality": "image", "backend": "timm", "model": "test_efficientnet", "device": "cpu"}
    spec = extractors.parse_extractor("nan", data | {"weights": str(tmp_path / "nan.safetensors")}, "extractors.nan")
    inputs = tables(tmp_path, [None, plain("red"), plain("blue")])
    with pytest.raises(UserError, match="2 vectors hold NaN or infinity, first of items i1, i2"):
        extract(spec, inputs, tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()


def test_not_one_image_and_not_one_readable_image_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 2 items has an input for image vectors"):
        extract(descriptor(), tables(tmp_path, [None, None]), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="all 2 inputs failed, first reason: 0 bytes"):
        extract(descriptor(), tables(tmp_path, [b"", b"x"]), tmp_path / "f.parquet")


def test_a_job_without_a_single_output_leaves_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extractors.image.descriptor import DescriptorExtractor

    inputs, run = tables(tmp_path, IMAGES[:3]), DescriptorExtractor.run
    monkeypatch.setattr(DescriptorExtractor, "run", lambda self, inputs, advance: run(self, [b"" for _ in inputs]))
    with pytest.raises(UserError, match="all 3 inputs failed"):
        extract(descriptor(), inputs, tmp_path / "f.parquet", code="abc")
    monkeypatch.undo()
    assert extract(descriptor(), inputs, tmp_path / "f.parquet", code="abc")["counts"]["ok"] == 3


def test_the_manifest_is_read_once_however_many_shards_there_are(tmp_path: Path) -> None:
    inputs = tables(tmp_path, [None, *IMAGES[:6]], per_shard=4)
    source = read_images(inputs["items"], inputs["manifest"])
    inputs["manifest"].unlink()
    found = [list(source.stream(part)) for part in np.array_split(source.rows, 3)]
    assert [one for part in found for one in part] == IMAGES[:6]


def test_a_manifest_of_other_items_is_refused(tmp_path: Path) -> None:
    inputs = tables(tmp_path, IMAGES[:2])
    write_images(tmp_path / "images", IMAGES[:2], ids=["i1", "i0"])
    with pytest.raises(UserError, match="its item ids are not those of"):
        extract(descriptor(), inputs, tmp_path / "f.parquet")


def test_a_batch_is_halved_when_memory_runs_out_and_stays_so() -> None:
    import torch

    tried: list[int] = []

    def forward(part: Any) -> list[int]:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [value * 10 for value in part]

    batch = Batch(8)
    assert batch.all(forward, list(range(10))) == [value * 10 for value in range(10)]
    assert batch.size == 2 and tried == [8, 4, 2, 2, 2, 2, 2]
    with pytest.raises(UserError, match="memory ran out on a single input"):
        Batch(4).all(lambda part: (_ for _ in ()).throw(MemoryError()), [1])
    with pytest.raises(RuntimeError, match="shapes"):
        Batch(4).all(lambda part: (_ for _ in ()).throw(RuntimeError("shapes")), [1])


def test_load_gives_every_backend_by_one_call() -> None:
    assert isinstance(extractors.load(DESCRIPTOR), Model)
    with pytest.raises(UserError, match=r"shoes\.backend"):
        extractors.load({"modality": "image"}, name="shoes")
