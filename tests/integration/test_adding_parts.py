"""A model and a metric, added to a checkout exactly as the documents show, are trained, tested and evaluated."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from checkout import CODE, Checkout, environment
from recipes import apply_recipe
from repository import ROOT

MODEL = "results/shop-logistic/metrics.json"


def code_files(folder: Path) -> dict[str, str]:
    places = [folder / name for name in (*CODE, "tests")]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in files
        if file.suffix in {".py", ".smk", ".yaml", ".yml", ".json", ".md"} and file.is_file()
    }


@pytest.fixture(scope="module")
def checkout(finished_checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    copy = finished_checkout.clone(tmp_path_factory.mktemp("adding") / "checkout")
    shutil.copytree(ROOT / "tests/support", copy.folder / "tests/support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", copy.folder)
    return copy


def added(checkout: Checkout, document: str, heading: str) -> set[str]:
    """Apply a section of a document; return the files that differ afterwards."""
    before = code_files(checkout.folder)
    named = apply_recipe(document, heading, checkout.folder)
    after = code_files(checkout.folder)
    changed = {file for file in after if before.get(file) != after[file]}
    assert changed == named
    return changed


def passes(checkout: Checkout, test: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=checkout.folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def add_and_check_a_model(checkout: Checkout):
    touched = added(checkout, "baselines.md", "Adding a model")
    assert touched - {"config/config.yaml"} == {
        "cm3/baselines/logistic_mf.py",
        "cm3/baselines/networks/logistic_mf.py",
        "cm3/model_registry.py",
        "tests/unit/baselines/test_logistic_mf.py",
    }
    passes(checkout, "tests/unit/baselines/test_logistic_mf.py")
    assert checkout.planned("results/shop/metrics.json") == {}
    checkout.run(MODEL)
    metrics = json.loads((checkout.folder / MODEL).read_text())
    assert metrics["config"]["model"] == {"name": "logistic-mf", "embedding_dim": 16, "reg_weight": 0.01}
    assert metrics["training"]["epochs"] == 4 and metrics["test"]["recall@10"] > 0
    assert metrics["config"]["training"]["patience"] == 20
    assert checkout.planned(MODEL) == {}
    checkout.edit("cm3/baselines/networks/logistic_mf.py", "(users * items).sum(1)", "(users * items).sum(1) * 0.5")
    assert checkout.planned(MODEL) == {"train": 1, "evaluate": 1, "publish": 1}, (
        "an edit of an unversioned model counts"
    )
    assert checkout.planned("results/shop/metrics.json") == {}
    checkout.edit("cm3/baselines/networks/logistic_mf.py", "(users * items).sum(1) * 0.5", "(users * items).sum(1)")


def add_and_check_a_metric(checkout: Checkout):
    touched = added(checkout, "metrics.md", "Adding a metric")
    assert touched == {
        "cm3/evaluation/f1.py",
        "cm3/evaluation/registry.py",
        "tests/unit/evaluation/test_f1.py",
    }
    passes(checkout, "tests/unit/evaluation/test_f1.py")
    assert checkout.planned("results/shop/metrics.json") == {"evaluate": 1, "publish": 1}
    before = json.loads((checkout.folder / "results/shop/metrics.json").read_text())
    checkout.run("results/shop/metrics.json")
    after = json.loads((checkout.folder / "results/shop/metrics.json").read_text())
    assert {name: value for name, value in after["test"].items() if not name.startswith("f1@")} == before["test"]
    per_user = pq.read_table(checkout.folder / "results/shop/per_user.parquet")
    assert after["test"]["f1@10"] == per_user["f1@10"].to_numpy().mean() > 0
    assert checkout.planned("results/shop/metrics.json") == {}


def test_a_model_and_a_metric_are_added_as_documented(checkout: Checkout):
    add_and_check_a_model(checkout)
    add_and_check_a_metric(checkout)
