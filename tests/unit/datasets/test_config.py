"""Config of data sets: what is refused and how, and which setting reaches which stage."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.keys import canonical_json
from cm3.common.paths import expand
from cm3.datasets.config import FINDERS, READERS, SOURCES, parse_dataset, stage_modules
from workflow.plan.digest import closure

FILES: dict[str, Any] = {"source": "files", "interactions": {"path": "log.csv"}}
BABY: dict[str, Any] = {"source": "amazon-2014", "category": "Baby"}
NAMED = {"path": "items.jsonl", "columns": {"image": "photo"}}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"source": "amazn-2014"},
            r"d\.x\.source = 'amazn-2014': there is no such source \(did you mean 'amazon-2014'\?\)",
        ),
        ({"source": ["sample"]}, r"d\.x\.source = \['sample'\]"),
        ({}, r"d\.x\.source: required.*sample, files, amazon-2014"),
        ("sample", r"d\.x = 'sample': must be a mapping"),
        ({"source": "sample", "user": 5}, r"d\.x\.user: unknown key \(did you mean 'users'\?\)"),
        ({"source": "sample", "users": "many"}, r"d\.x\.users = 'many'"),
        ({"source": "sample", "users": 0}, r"d\.x\.users = 0"),
        ({"source": "sample", "images": {"folder": "p"}}, r"d\.x\.images\.folder: unknown key"),
        ({"source": "sample", "split": {"sed": 1}}, r"d\.x\.split\.sed: unknown key \(did you mean 'seed'\?\)"),
        ({"source": "sample", "split": {"strategy": "radnom"}}, r"d\.x\.split\.strategy = 'radnom'"),
        ({"source": "files"}, r"d\.x\.interactions: required, but not given"),
        ({"source": "files", "interactions": {"path": "log.xls"}}, r"no format is known by the suffix of 'log\.xls'"),
        ({**FILES, "images": {"folder": "p"}}, r"needs images\.pattern, or items\.columns\.image"),
        ({**FILES, "images": {"pattern": "{item_id}.jpg"}}, r"pattern needs images\.folder"),
        (
            {**FILES, "images": {"folder": "p", "pattern": "{id}.jpg"}},
            r"images\.pattern\.0 = '{id}\.jpg': may hold {item_id}",
        ),
        ({**FILES, "images": {"folder": "p", "pattern": "{item_id.__class__}"}}, r"may hold {item_id}"),
        ({**FILES, "images": {"folder": "p", "pattern": "{item_id!r}"}}, r"may hold {item_id}"),
        ({**FILES, "images": {"folder": "p", "pattern": "all.jpg"}}, r"at least one of them"),
        ({**FILES, "images": {"folder": "p", "pattern": "{"}}, r"not a pattern"),
        ({**FILES, "items": NAMED, "images": {}}, r"images\.hosts must list the hosts"),
        ({**FILES, "images": {"hosts": ["a.org"]}}, r"images needs a folder, or items\.columns\.image"),
        ({**FILES, "items": NAMED, "images": {"folder": "p", "hosts": ["a.org"]}}, r"not both"),
        ({**FILES, "items": {"path": "i.csv", "columns": {"titel": "t"}}}, r"d\.x\.items\.columns\.titel: .*'title'"),
        ({**BABY, "category": "../etc"}, r"d\.x\.category = '\.\./etc'"),
        ({**BABY, "mirrors": ["ftp://a.org"]}, r"d\.x\.mirrors\.0 = 'ftp://a\.org': must be an http"),
        ({**BABY, "sha256": {"meta_Bay.json.gz": "0" * 64}}, r"no file of it \(did you mean 'meta_Baby\.json\.gz'\?\)"),
        ({**BABY, "sha256": {"meta_Baby.json.gz": "abc"}}, r"d\.x\.sha256\.meta_Baby\.json\.gz = 'abc'"),
        ({**BABY, "images": {"folder": "p"}}, r"images\.folder needs images\.pattern"),
        ({**BABY, "kcore": -1}, r"d\.x\.kcore = -1"),
        ({**BABY, "unknown_items": "ignore"}, r"d\.x\.unknown_items = 'ignore'"),
    ],
)
def test_faults_name_the_key_the_value_and_the_way_out(data: Any, complaint: str):
    with pytest.raises(UserError, match=complaint):
        parse_dataset("x", data, "d.x")


@pytest.mark.parametrize("name", ["../x", "a b", "", "a/b", "-x"])
def test_a_name_that_is_no_folder_is_refused(name: str):
    with pytest.raises(UserError, match="becomes a folder"):
        parse_dataset(name, {"source": "sample"}, f"datasets.{name}")


def stages_of(data: dict[str, Any]) -> dict[str, str]:
    """What each stage is given, as the workflow hands it over."""
    found = parse_dataset("x", data, "d.x")
    return {
        "prepare": canonical_json([found.prepare_spec(), found.prepare_inputs("x")]),
        "split": canonical_json(found.split_spec()),
        "images": canonical_json([found.images_spec(), found.image_inputs("x")]),
        "images runtime": canonical_json(found.images_runtime()),
        "downloads": canonical_json(found.downloads("x")),
    }


@pytest.mark.parametrize(
    ("data", "edit", "reaches"),
    [
        (BABY, {"split": {"seed": 7}}, {"split"}),
        (BABY, {"split": {"strategy": "global-time"}}, {"split"}),
        (BABY, {"kcore": 3}, {"prepare"}),
        (BABY, {"expected": {"users": 19445}}, {"prepare"}),
        (BABY, {"unknown_items": "drop"}, {"prepare"}),
        (BABY, {"images": {"rate": 5.0, "concurrency": 2, "timeout": 9.0, "attempts": 2}}, {"images runtime"}),
        (BABY, {"images": {"max_pixels": 1000}}, {"images"}),
        (BABY, {"images": {"folder": "p", "pattern": "{item_id}.jpg"}}, {"images", "images runtime"}),
        (BABY, {"sha256": {"meta_Baby.json.gz": "0" * 64}}, {"downloads", "prepare"}),
        (BABY, {"interactions": "reviews"}, {"prepare"}),
        ({"source": "sample"}, {"images": {"max_pixels": 1000}}, {"images"}),
        ({"source": "sample"}, {"seed": 2, "users": 50}, set()),
        ({**FILES, "items": NAMED}, {"images": {"folder": "p"}}, {"images"}),
        (FILES, {"interactions": {"path": "other.csv"}}, {"prepare"}),
    ],
)
def test_a_setting_reaches_its_own_stage_only(data: dict[str, Any], edit: dict[str, Any], reaches: set[str]):
    before, after = stages_of(data), stages_of({**data, **edit})
    assert {name for name in before if before[name] != after[name]} == reaches


def test_one_name_and_a_list_of_one_are_the_same():
    one = {
        **FILES,
        "items": {"path": "i.csv", "columns": {"title": "t"}},
        "images": {"folder": "p", "pattern": "{item_id}.png"},
    }
    several = {
        **FILES,
        "items": {"path": "i.csv", "columns": {"title": ["t"]}},
        "images": {"folder": "p", "pattern": ["{item_id}.png"]},
    }
    assert stages_of(one) == stages_of(several)


def test_sample_settings_reach_the_generator():
    found = parse_dataset("s", {"source": "sample", "seed": 9, "users": 50, "kcore": 2}, "d.s")
    spec = found.sample_spec()  # type: ignore[attr-defined]
    assert spec["seed"] == 9 and spec["users"] == 50
    assert not {"source", "kcore", "split", "images", "unknown_items", "cold_items"} & set(spec)
    assert found.prepare_inputs("s") == {"reviews": "raw/s/reviews.json.gz", "meta": "raw/s/meta.json.gz"}
    assert found.image_inputs("s") == {"images": "raw/s/pictures.sha256"}


def test_amazon_files_have_mirrors():
    found = parse_dataset("baby", {**BABY, "mirrors": ["https://a.org/tree/", "http://b.org/tree"]}, "d.baby")
    files = found.downloads("baby")
    assert files["raw/baby/ratings_Baby.csv"]["urls"] == [
        "https://a.org/tree/categoryFiles/ratings_Baby.csv",
        "http://b.org/tree/categoryFiles/ratings_Baby.csv",
    ]
    assert files["raw/baby/image_features_Baby.b"]["urls"][0] == (
        "https://a.org/tree/image_features/categoryFiles/image_features_Baby.b"
    )
    assert set(found.prepare_inputs("baby").values()) <= set(files)
    assert "m.media-amazon.com" in found.images_spec()["hosts"] and not found.images_spec()["private"]


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHOP", "/data/shop")
    data = {
        "source": "files",
        "interactions": {"path": "$SHOP/log.tsv.gz"},
        "items": {"path": "~/items.parquet"},
        "images": {"folder": "${SHOP}/p", "pattern": "{item_id}.jpg"},
    }
    found = parse_dataset("x", data, "d.x")
    assert found.prepare_inputs("x") == {"interactions": "/data/shop/log.tsv.gz", "items": f"{tmp_path}/items.parquet"}
    assert found.image_folder() == "/data/shop/p"
    # Where the files lie is no part of what is made of them.
    assert "SHOP" not in canonical_json(found.prepare_spec())
    with pytest.raises(UserError, match=r"\$NOWHERE/x: the environment variable \$NOWHERE is not set"):
        expand("$NOWHERE/x")


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "TSV", "inter", "jsonl.gz", "parquet"])
def test_formats_go_by_the_suffix(suffix: str):
    found = parse_dataset("x", {"source": "files", "interactions": {"path": f"a.b/log.{suffix}"}}, "d.x")
    expected = {"inter": "tsv"}.get(suffix, suffix.lower().removesuffix(".gz"))
    assert found.prepare_spec()["interactions"]["format"] == expected


def test_the_registries_name_modules_that_exist():
    assert set(READERS) == set(SOURCES)
    for name in READERS.values():
        assert callable(importlib.import_module(name).Reader)
    for name in FINDERS.values():
        assert callable(importlib.import_module(name).find)
    for data in ({"source": "sample"}, FILES, BABY):
        modules = stage_modules(parse_dataset("x", data, "d.x"))
        assert set(modules) == {"prepare", "images"} and modules["prepare"] == [READERS[data["source"]]]


def test_every_key_is_described():
    for model in SOURCES.values():
        undescribed = [n for n, f in model.model_fields.items() if not f.description and n not in ("source", "split")]
        assert [n for n in undescribed if n not in ("images", "expected")] == []


def test_a_source_runs_its_own_parsers_code_only():
    root = ROOT
    code = {}
    for data in (FILES, BABY):
        modules = stage_modules(parse_dataset("x", data, "d.x"))
        code[data["source"]] = {
            stage: closure(
                root,
                [{"images": "cm3.datasets.images.stage", "prepare": "cm3.datasets.prepare"}[stage], *modules[stage]],
            )
            for stage in modules
        }
    assert (
        "cm3.datasets.files.reader" in code["files"]["prepare"]
        and "cm3.datasets.amazon.v2014" not in code["files"]["prepare"]
    )
    assert (
        "cm3.datasets.amazon.v2014" in code["amazon-2014"]["prepare"]
        and "cm3.datasets.files.reader" not in code["amazon-2014"]["prepare"]
    )
    assert (
        "cm3.datasets.images.none" in code["files"]["images"]
        and "cm3.datasets.images.web" not in code["files"]["images"]
    )
    # Config reaches a stage through its spec; code of the split or the images is none of prepare's.
    assert (
        not {"cm3.datasets.config", "cm3.datasets.images.config", "cm3.datasets.splits", "cm3.datasets.images.stage"}
        & code["files"]["prepare"]
    )
