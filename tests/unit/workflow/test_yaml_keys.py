"""A key given twice in a file of settings is an error with both lines; merge keys and anchors keep working."""

import re
from pathlib import Path

import pytest
import yaml
from checkout import SMALL
from repository import ROOT

from cm3.common.errors import UserError
from workflow.plan.config import load_config
from workflow.plan.yaml_keys import check_duplicate_keys


def faults(path: Path, text: str) -> list[str]:
    path.write_text(text)
    try:
        check_duplicate_keys([path])
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", (3, 1)),
        (
            "experiments:\n  x:\n    training:\n      epochs: 300\n      lr: 0.1\n      epochs: 3\n",
            "experiments.x.training.epochs",
            (6, 4),
        ),
        ("a: {q: 1, r: 2,\n  q: 3}\n", "a.q", (2, 1)),
        ("a:\n  - {q: 1}\n  - q: 1\n    q: 2\n", "a[1].q", (4, 3)),
        ("a: 1\n'a': 2\n", "a", (2, 1)),
        ("base: &base\n  x: 1\n  x: 2\nother: *base\n", "base.x", (3, 2)),
        ('{"a": 1,\n "a": 2}\n', "a", (2, 1)),
        ("\ufeffa: 1\na: 2\n", "a", (2, 1)),
    ],
)
def test_a_key_twice_names_both_lines(tmp_path: Path, text: str, key: str, lines: tuple[int, int]):
    (fault,) = faults(tmp_path / "x.yaml", text)
    assert f"x.yaml, line {lines[0]}: duplicate key {key!r}, first in line {lines[1]}" in fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a text",
        "a: {x: 1}\nb: {x: 1}\n",
        "base: &base {x: 1, y: 2}\na: {<<: *base, x: 3}\n",
        "one: &one {x: 1}\ntwo: &two {x: 2}\na:\n  <<: *one\n  <<: *two\n  x: 3\n",
        "base: &base {x: 1}\na: {<<: [*base, *base], x: 3}\n",
        "1: a\n'1': b\n",
        "a: &a\n  itself: *a\n",
        "a: [1, 1]\n",
        "not: [yaml\n",
    ],
)
def test_other_files_pass(tmp_path: Path, text: str):
    assert faults(tmp_path / "x.yaml", text) == []


def test_all_files_are_checked_and_all_faults_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("a: 1\na: 2\nb: 1\nb: 2\n")
    with pytest.raises(UserError) as error:
        load_config(SMALL, [tmp_path / "one.yaml", tmp_path / "two.yaml", tmp_path / "absent.yaml"])
    assert len(re.findall(r"(one|two)\.yaml, line (2|4): duplicate key '(a|b)'", str(error.value))) == 4
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(f"{yaml.safe_dump(SMALL)}\ndatasets: {{}}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config/config\.yaml, line \d+: duplicate key 'datasets', first in line 1;"):
        load_config(SMALL)


def test_a_corrected_file_passes(tmp_path: Path):
    assert faults(tmp_path / "x.yaml", "a: 1\na: 2\n") and not faults(tmp_path / "x.yaml", "a: 1\nbb: 2\n")


@pytest.mark.parametrize("path", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_files_have_each_key_once(path: Path):
    check_duplicate_keys([path])
