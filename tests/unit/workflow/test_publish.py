"""metrics.json: the facts of each stage, library versions, and a warning if features come from different ones."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from checkout import SMALL
from golden import check_golden

from cm3.common.errors import DamagedFileError
from cm3.common.files import read_json, sha256_of, write_json
from cm3.common.stages import STAGES
from cm3.common.tables import ITEMS, RECOMMENDATIONS, USERS, write_table
from cm3.common.tensors import write_tensors
from cm3.evaluation.recommendations import ids_of, write_recommendations
from cm3.evaluation.results import RankedLists
from workflow.plan.config import load_config
from workflow.plan.publish import publish
from workflow.publish import gather, library_warning
from workflow.publish import publish as publish_files

LIBRARIES = {"extract.text": ["torch", "transformers"], "extract.image": ["timm", "torch"]}


def record(**facts: Any) -> dict[str, Any]:
    """A stage's record."""
    return {
        "stage": "demo",
        "started": 1.0,
        "wall_seconds": 2.0,
        "peak_memory_mb": 100.0,
        "code": "demo 1",
        "device": "cpu",
        "threads": 2,
        "versions": {"python": "3.11.7"},
        **facts,
    }


def records(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of an experiment with text and image features."""
    counts = {"ok": 3, "missing": 0, "failed": 0}
    found = {
        "prepare": record(raw={"reviews": {"sha256": "0"}}, versions={"python": "3.11.7", "duckdb": "2.0"}),
        "extract.text": record(counts=counts, versions={"torch": "2.15", "transformers": "5.23.0"}),
        "extract.image": record(counts=counts, device="cuda", versions={"torch": "2.15", "timm": "1.0"}),
        "train": record(epochs=3, threads=8, versions={"python": "3.12.1", "torch": "2.15"}),
    }
    return {name: found[name] | changes.get(name.replace(".", "_"), {}) for name in found}


def metrics(**changes: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of the experiment."""
    provenance = {"experiment": "shop", "dataset": "shop", "command": "x", "config": {}, "keys": {}}
    return gather(provenance | {"libraries": LIBRARIES}, {"test": {}}, {}, records(**changes))


def test_every_stage_has_its_versions_device_and_threads():
    found = metrics()
    assert found["stages"]["extract.image"] == {
        "wall_seconds": 2.0,
        "peak_memory_mb": 100.0,
        "code": "demo 1",
        "device": "cuda",
        "threads": 2,
        "versions": {"torch": "2.15", "timm": "1.0"},
    }
    assert found["stages"]["train"]["threads"] == found["training"]["threads"] == 8
    assert found["training"] == {"epochs": 3, "device": "cpu", "threads": 8}
    assert found["coverage"]["text"]["ok"] == 3
    assert "warning" not in found


def test_versions_are_those_of_all_stages_and_of_training_where_they_differ():
    found = metrics()["versions"]
    expected = {"python": "3.12.1", "torch": "2.15", "transformers": "5.23.0", "timm": "1.0", "duckdb": "2.0"}
    assert found.items() >= expected.items() and found["snakemake"]


def test_records_of_earlier_releases_lack_facts_and_are_published():
    old = {name: value for name, value in record().items() if name not in ("device", "threads", "versions")}
    provenance = {"experiment": "shop", "dataset": "shop", "command": "x", "config": {}, "keys": {}}
    stages = gather(provenance, {"test": {}}, {}, records() | {"prepare": old})["stages"]
    assert stages["prepare"]["device"] is None and stages["prepare"]["versions"] is None


def test_features_from_different_versions_of_a_library_are_a_warning():
    found = metrics(extract_image={"versions": {"torch": "2.16", "timm": "1.0"}})
    assert found["warning"] == (
        "features come from different versions of torch 2.15 (extract.text) and 2.16 (extract.image)"
    )
    assert next(iter(found)) == "warning"


def test_cached_features_from_another_version_are_a_warning_next_to_other_warnings():
    cached = {"torch 2.15, transformers 5.23.0": 90, "torch 2.15, transformers 5.1.0": 10}
    found = metrics(extract_text={"library_versions": cached}, train={"warning": "epochs were selected on test"})
    assert found["warning"] == (
        "epochs were selected on test; features come from different versions of "
        "transformers 5.1.0 (extract.text) and 5.23.0 (extract.text)"
    )
    assert found["stages"]["extract.text"]["library_versions"] == cached


def test_libraries_that_an_extractor_does_not_use_do_not_count():
    different = records(extract_image={"versions": {"torch": "2.15", "transformers": "4.0"}})
    assert library_warning(different, LIBRARIES) is None
    assert library_warning(records(), {}) is None


def test_publishing_gets_the_libraries_of_each_extraction_and_captioning():
    spec = publish(load_config(SMALL), "shop").spec
    assert "sentence-transformers" in spec["libraries"]["extract.text"]
    assert "scikit-image" in spec["libraries"]["extract.image"]
    captions = copy.deepcopy(SMALL)
    captions["extractors"]["sayer"] = {
        "modality": "caption",
        "backend": "openai-caption",
        "model": "m",
        "url": "http://127.0.0.1:9/v1",
        "encoder": "words",
    }
    captions["experiments"]["shop"]["modalities"] = {"caption": "sayer"}
    spec = publish(load_config(captions), "shop").spec
    assert set(spec["libraries"]) == {"extract.caption", "caption.caption"}


def test_publishing_gives_the_golden_output():
    found = metrics(extract_image={"versions": {"torch": "2.16", "timm": "1.0"}})
    del found["versions"]["snakemake"]  # the installed one
    check_golden("publish", STAGES["publish"].version, found)


@pytest.mark.parametrize("release", ["this", "earlier"])
def test_published_recommendations_have_ids_whichever_release_made_the_run(tmp_path: Path, release: str):
    items = pa.table({name: {"item": [0, 1], "item_id": ["b", "a"]}.get(name, [None] * 2) for name in ITEMS.names})
    write_table(tmp_path / "items.parquet", items.cast(ITEMS), ITEMS)
    write_table(
        tmp_path / "users.parquet", pa.table({"user": pa.array([0], pa.int32()), "user_id": ["u"]}, USERS), USERS
    )
    run, expected = tmp_path / "run.parquet", tmp_path / "expected.parquet"
    columns = {"user_id": ["u", "u"], "item_id": ["a", "b"], "rank": [1, 2], "score": [0.5, 0.25]}
    for path in (run, expected):
        write_table(path, pa.table(columns).cast(RECOMMENDATIONS), RECOMMENDATIONS)
    if release == "this":
        lists = RankedLists(np.array([0]), np.array([[1, 0]]), np.array([[0.5, 0.25]], np.float32))
        write_recommendations(run, [lists], ids_of(["u"], ["b", "a"]), 2)
    files = {"recommendations": run, "evaluation": tmp_path / "evaluation.json", "stats": tmp_path / "stats.json"}
    files |= {name: tmp_path / f"{name}.parquet" for name in ("items", "users")}
    for kind, values in (records() | {"evaluation": {}, "stats": {}}).items():
        path = files.setdefault(kind if kind in files else f"record.{kind}", tmp_path / f"{kind}.stage.json")
        write_json(path, values)
    outputs = {"recommendations": tmp_path / "out/recommendations.parquet", "metrics": tmp_path / "out/metrics.json"}
    provenance = {"experiment": "shop", "dataset": "shop", "command": "x", "config": {}, "keys": {}}
    publish_files(provenance, files, outputs)
    assert outputs["recommendations"].read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", ["model", "history", "per_user", "evaluation", "stats", "record.prepare"])
def test_a_damaged_file_of_the_run_is_named_and_nothing_of_it_is_published(tmp_path: Path, name: str):
    files = {kind: tmp_path / f"{kind}.json" for kind in ("evaluation", "stats")}
    files |= {"model": tmp_path / "model.safetensors", "history": tmp_path / "history.csv"}
    files["per_user"] = tmp_path / "per_user.parquet"
    files["history"].write_text("epoch,loss\n1,0.5\n2,0.25\n")
    write_tensors(files["model"], {"users": torch.ones(9, 4)}, {"epoch": 2})
    table = pa.table({"user": pa.array(range(50), pa.int32()), "user_id": [f"u{n}" for n in range(50)]}, USERS)
    write_table(files["per_user"], table, USERS)
    for kind, values in {"evaluation": {"test": {"recall@20": 0.25}}, "stats": {"users": 50}}.items():
        write_json(files[kind], values)
    of_run = records(train={**record(epochs=2), "history_sha256": sha256_of(files["history"])})
    for kind, values in of_run.items():
        files[f"record.{kind}"] = tmp_path / f"{kind}.stage.json"
        write_json(files[f"record.{kind}"], values)
    outputs = {kind: tmp_path / "out" / files[kind].name for kind in ("model", "history", "per_user")}
    outputs["metrics"] = tmp_path / "out/metrics.json"
    provenance = {"experiment": "shop", "dataset": "shop", "command": "x", "config": {}, "keys": {}}
    publish_files(provenance, files, outputs)
    assert all(outputs[kind].read_bytes() == files[kind].read_bytes() for kind in outputs if kind != "metrics")
    assert read_json(outputs["metrics"])["data"] == {"users": 50}
    content = bytearray(files[name].read_bytes())
    content[len(content) // 2] ^= 1
    files[name].write_bytes(content)
    for path in outputs.values():
        path.unlink()
    with pytest.raises(DamagedFileError, match=f"{files[name].name}: damaged"):
        publish_files(provenance, files, outputs)
    assert not outputs["metrics"].exists() and not outputs.get(name, outputs["metrics"]).exists()
