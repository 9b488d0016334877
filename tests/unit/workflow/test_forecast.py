"""What a run costs, from the configuration alone, and large models that a machine without a GPU refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL

from extractors.caption.transformers import TransformersCaptionSpec
from workflow.plan.config import Config, load_config
from workflow.plan.forecast import PlannedJob, forecast

QWEN = {
    "modality": "caption",
    "backend": "transformers-caption",
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "revision": "cc594898137f460bfe9f0759e9844b3ce807cfb5",
    "encoder": "words",
}
JOBS = [
    PlannedJob("download", {"dataset": "baby", "file": "categoryFiles/meta_Baby.json.gz"}),
    PlannedJob("prepare", {"dataset": "baby"}),
    PlannedJob("images", {"dataset": "baby"}),
    PlannedJob("caption", {"dataset": "baby", "extractor": "qwen"}),
    PlannedJob("extract", {"dataset": "baby", "extractor": "qwen"}),
    PlannedJob("train", {"experiment": "baby"}),
]


@pytest.fixture(autouse=True)
def slow_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without results, and a machine whose speed needs no measurement: a second for 10^9 parameters an item."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        TransformersCaptionSpec, "cpu_hours", lambda self, parameters, items: items * parameters / 3.6e12
    )


def config(items: int | None = 7050, **qwen: Any) -> Config:
    raw = copy.deepcopy(SMALL)
    expected = {} if items is None else {"expected": {"items": items}}
    raw["datasets"]["baby"] = {"source": "amazon-2014", "category": "Baby", **expected}
    raw["extractors"]["qwen"] = QWEN | qwen
    return load_config(raw)


def test_downloads_images_and_hours_are_stated():
    found = forecast(config(), JOBS, gpu=False)
    assert found.lines[0].startswith(
        "downloads, unless they are here already: 1 published file (size unknown); weights of Qwen/"
    )
    assert "7B-Instruct (about 14 GB)" in found.lines[0]
    assert "images of baby: about 7,050, from the web" in found.lines
    assert "caption baby qwen: about 13.7 hours on this CPU" in found.lines
    assert any(line.startswith("extract baby qwen: at most about") for line in found.lines)


@pytest.mark.parametrize(
    ("sizes", "stated"),
    [
        ([52_400_000, 1_200_000_000], "2 published files (1.3 GB)"),
        ([52_400_000, None], "2 published files (52 MB and 1 of unknown size)"),
        ([None, None], "2 published files (size unknown)"),
        ([300, 0], "2 published files (1 MB)"),
    ],
)
def test_the_size_of_downloads_is_stated_as_far_as_it_is_known(sizes: list[int | None], stated: str):
    jobs = [
        PlannedJob("download", {"dataset": "baby", "file": f"categoryFiles/{file}"})
        for file in ("meta_Baby.json.gz", "ratings_Baby.csv")
    ]
    assert forecast(config(), jobs, gpu=False, sizes=lambda files: sizes).lines == [
        f"downloads, unless they are here already: {stated}"
    ]


def test_a_large_model_is_refused_without_a_gpu():
    [reason] = forecast(config(), JOBS, gpu=False).refused
    assert reason.startswith("extractors.qwen: a model of 7.0 billion parameters on this CPU needs about 13.7 hours")
    shown = forecast(config(), JOBS, gpu=False)
    assert shown.described(refusals=True) == [*shown.lines, f"would be refused here: {reason}"]
    assert shown.described(refusals=False) == shown.lines
    assert "allow_slow: true" in reason and "openai-caption" in reason


@pytest.mark.parametrize(
    ("qwen", "gpu"),
    [({}, True), ({"allow_slow": True}, False), ({"model": "org/SmolVLM-0.5B"}, False)],
    ids=["with a GPU", "allowed", "a small model"],
)
def test_other_runs_are_not_refused(qwen: dict[str, Any], gpu: bool):
    assert forecast(config(**qwen), JOBS, gpu).refused == []


def test_a_large_model_is_refused_where_the_items_are_not_counted_yet():
    found = forecast(config(items=None), JOBS, gpu=False)
    assert "for 1000 items" in found.refused[0]
    assert not any("hours" in line for line in found.lines)


def test_finished_captions_cost_nothing():
    assert forecast(config(), [PlannedJob("train", {"experiment": "baby"})], gpu=False).lines == []


def test_a_gpu_is_named():
    lines = forecast(config(), JOBS, gpu=True).lines
    assert "caption baby qwen: at most about 9.8 hours with a small GPU" in lines
