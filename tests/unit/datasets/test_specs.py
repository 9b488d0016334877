"""Config of data sets: what is refused and how, and which setting reaches which stage."""

import ast
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pytest
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.keys import canonical_json
from cm3.common.parts import Part
from cm3.common.paths import expand
from cm3.datasets.registry import IMAGE_SOURCES, image_source, parse_dataset, source_spec, source_specs

FILES: dict[str, Any] = {"source": "files", "interactions": {"path": "log.csv"}}
BABY: dict[str, Any] = {"source": "amazon-2014", "category": "Baby"}
NAMED = {"path": "items.jsonl", "columns": {"image": "photo"}}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"source": "amazn-2014"},
            r"d\.x\.source = 'amazn-2014': unknown source \(did you mean 'amazon-2014'\?\)",
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
        (
            {"source": "files", "interactions": {"path": "log.xls"}},
            r"'log\.xls' is a spreadsheet; save the sheet as CSV",
        ),
        ({**FILES, "images": {"folder": "p"}}, r"needs images\.pattern, or items\.columns\.image"),
        ({**FILES, "images": {"pattern": "{item_id}.jpg"}}, r"pattern needs images\.folder"),
        (
            {**FILES, "images": {"folder": "p", "pattern": "{id}.jpg"}},
            r"images\.pattern = '{id}\.jpg': may hold {item_id}",
        ),
        (
            {**FILES, "images": {"folder": "p", "pattern": ["{item_id}.jpg", "{id}.png"]}},
            r"images\.pattern\.1 = '{id}\.png': may hold {item_id}",
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
        (
            {**BABY, "sha256": {"meta_Bay.json.gz": "0" * 64}},
            r"is not one of the published files \(did you mean 'meta_Baby\.json\.gz'\?\)",
        ),
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
    spec = found.generate_spec()  # type: ignore[attr-defined]
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


def test_the_registries_name_classes_and_functions_that_exist():
    for name, spec in source_specs().items():
        module, _, reader = spec.reader.partition(":")
        assert get_args(spec.model_fields["source"].annotation) == (name,)
        assert callable(getattr(importlib.import_module(module), reader)), name
        assert issubclass(spec, Part) and spec.code_version(), name
        for library in spec.libraries:
            assert metadata.version(library), name
    assert all(callable(image_source(name)) for name in IMAGE_SOURCES)
    for data in ({"source": "sample"}, FILES, {**FILES, "items": NAMED, "images": {"folder": "p"}}, BABY):
        assert parse_dataset("x", data, "d.x").images_spec()["find"] in IMAGE_SOURCES


def test_a_source_without_version_is_identified_by_its_reader(monkeypatch: pytest.MonkeyPatch):
    class Draft(source_spec("mmrec")):  # type: ignore[misc]
        version = None

    before = Draft.code_version()
    assert source_spec("mmrec").code_version() == "1" and before.startswith("dev-")
    monkeypatch.setattr(Draft, "reader", source_spec("files").reader)
    assert Draft.code_version() != before


def test_an_estimate_needs_no_file():
    for data in (FILES, BABY):
        found = parse_dataset("x", data, "d.x")
        assert found.prepare_estimate(found.prepare_inputs("x")) == (1500, 15)


def test_counts_come_from_expected_or_from_the_generator():
    counts = {"expected": {"items": 7050}}
    assert parse_dataset("x", {**BABY, **counts}, "d.x").expected_counts() == {"items": 7050}
    sample = parse_dataset("x", {"source": "sample", "users": 20, **counts}, "d.x")
    assert sample.expected_counts() == {"users": 20, "items": 7050}


def test_every_key_is_described():
    for model in source_specs().values():
        undescribed = [n for n, f in model.model_fields.items() if not f.description and n not in ("source", "split")]
        assert [n for n in undescribed if n not in ("images", "expected")] == []


def test_a_source_loads_its_own_reader_only():
    code = (
        "import sys; from cm3.datasets.registry import parse_dataset, source_spec; "
        f"spec = parse_dataset('x', {FILES!r}, 'd.x').prepare_spec(); "
        "light = set(sys.modules); source_spec(spec['source']).open_reader(spec, {}); "
        "print([n for n in ('pyarrow', 'numpy', 'cm3.datasets.amazon.config') if n in light]); "
        "print([n for n in sys.modules if n.startswith('cm3.datasets.') and n.endswith(('reader', 'v2014', 'web'))])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    light, loaded = lines.splitlines()
    assert light == "[]"
    assert set(ast.literal_eval(loaded)) == {"cm3.datasets.reader", "cm3.datasets.files.reader"}
