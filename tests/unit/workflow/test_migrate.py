"""Files that release 0.1.0 made stay up to date: their records are rewritten from digests of code to versions."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL

from cm3.common.files import read_json
from cm3.common.stages import STAGES
from cm3.datasets.registry import SOURCES
from cm3.evaluation.registry import METRICS
from cm3.model_registry import MODELS
from extractors.registry import BACKENDS
from workflow.plan.config import load_config
from workflow.plan.migrate import DIGESTS, MARK, migrate_records
from workflow.plan.publish import publish_inputs

TRAIN = {
    "rule": "train",
    "shellcmd": "exec python -m cm3.train --spec '{}'",
    "params": ["'cm3.train'", "'settings 1b3955185689, code 1c043aa0e227b0c5'"],
    "code": "exec python -m {params.stage} {params.arguments}",
    "software_stack_hash": "0" * 32,
    "input": ["processed/hm/items.parquet"],
}


def write(folder: Path, name: str, record: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def identity(text: str) -> list[str]:
    return [repr(text)]


def test_a_record_of_the_release_gets_the_version_that_follows_its_digest(tmp_path: Path):
    path = write(tmp_path, "@long/name", TRAIN)
    assert migrate_records(tmp_path) == 1
    record = read_json(path)
    assert record["params"] == identity("settings 1b3955185689, version train 1, cm3 1")
    assert record["input"] == TRAIN["input"] and "code" not in record and "software_stack_hash" not in record


def test_sources_that_share_a_digest_are_told_apart_by_the_command(tmp_path: Path):
    paths = {}
    for source in ("sample", "amazon-2014"):
        command = f'exec python -m sources.prepare --spec \'{{"kcore":5,"source":"{source}"}}\''
        params = identity("settings 2f9651200377, code 019b511f8e80543a")
        paths[source] = write(tmp_path, source, {"rule": "prepare", "shellcmd": command, "params": params})
    assert migrate_records(tmp_path) == 2
    for source, path in paths.items():
        assert read_json(path)["params"] == identity(f"settings 2f9651200377, version prepare 1, {source} 1")


@pytest.mark.parametrize("rule", ["publish", "publish_item_weights", "publish_lists"])
def test_publishing_gets_the_tables_that_it_reads_now(tmp_path: Path, rule: str):
    tables = ["processed/hm/items.parquet", "processed/hm/users.parquet"]
    record = {
        "rule": rule,
        "params": identity("settings 1b3955185689, version publish 1"),
        "input": ["processed/hm/stats.json", "results/hm/runs/1/model.safetensors"],
        "input_checksums": {"processed/hm/stats.json": "sha256:0"},
    }
    path = write(tmp_path, "published", record)
    (tmp_path / MARK).write_text('{"identity": "versions"}')  # of an earlier rewriting
    assert migrate_records(tmp_path) == 1
    assert read_json(path) == record | {"input": [tables[0], record["input"][0], tables[1], record["input"][1]]}
    assert migrate_records(tmp_path) == 0
    inputs = publish_inputs(load_config(SMALL), "shop")
    assert {inputs["items"], inputs["users"]} == {name.replace("hm", "shop") for name in tables}


def test_other_records_are_left_alone(tmp_path: Path):
    others = {
        "edited": TRAIN | {"params": identity("settings 1b3955185689, code 0123456789abcdef")},
        "now": TRAIN | {"params": identity("settings 1b3955185689, version train 1, cm3 1")},
        "without": {"rule": "x"},
        "list": [],
    }
    paths = {name: write(tmp_path, name, record) for name, record in others.items()}
    (tmp_path / "half").write_text('{"rule": ')
    assert migrate_records(tmp_path) == 0
    assert {name: read_json(path) for name, path in paths.items()} == others
    assert (tmp_path / "half").read_text() == '{"rule": '


def test_records_are_rewritten_once(tmp_path: Path):
    write(tmp_path, "first", TRAIN)
    assert migrate_records(tmp_path) == 1
    later = write(tmp_path, "later", TRAIN)
    assert migrate_records(tmp_path) == 0
    assert read_json(later) == TRAIN


def test_a_downloaded_file_is_not_fetched_again(tmp_path: Path):
    path = write(tmp_path, "download", {"rule": "download", "params": identity("settings 1b3955185689, code any")})
    migrate_records(tmp_path)
    assert read_json(path)["params"] == identity("settings 1b3955185689, version any")


def test_the_table_has_every_stage_and_part_of_the_release():
    stages, parts = set(), set()
    for version in read_json(DIGESTS):
        stage, *part = (name.removesuffix(" 1") for name in version.split(", "))
        stages.add(stage)
        parts |= set(part)
    later = {"external", "reduce", "rerank", "reviews", "user-groups"}
    assert stages == {name for name in STAGES if not name.endswith("-page")} - {"download"} - later
    assert parts <= {*SOURCES, *BACKENDS, *MODELS, *METRICS}, "later parts have no digest of that release"
