"""A new backend, added to a copy of the repository exactly as docs/extractors.md shows."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures_extractors import plain, write_images, write_items
from repository import ROOT

from cm3.common.features import read_features

COPIED = ("cm3", "config", "extractors", "pyproject.toml", "tests/support", "workflow")
SECTION = (ROOT / "docs/extractors.md").read_text().partition("\n## A new backend\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, set[str]]]:
    """A copy with the documented backend in it, and the names of the files that were written."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    files = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", SECTION, re.DOTALL)
    for name, code in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    ((registry, line),) = re.findall(r"`([\w/]+\.py)`, inside `BACKENDS`:\n\n( +.*\n)", SECTION)
    text = (folder / registry).read_text()
    (folder / registry).write_text(text.replace("BACKENDS = {\n", f"BACKENDS = {{\n{line}"))
    yield folder, {registry, *(name for name, _ in files)}


def run(folder: Path, *arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_files_are_written_one_of_them_by_one_line(checkout: tuple[Path, set[str]]) -> None:
    folder, written = checkout
    assert written == {
        "extractors/image/mean_colour.py",
        "extractors/registry.py",
        "tests/unit/extractors/test_mean_colour.py",
    }
    before, after = ((root / "extractors/registry.py").read_text() for root in (ROOT, folder))
    assert len(after.splitlines()) == len(before.splitlines()) + 1


def test_the_documented_test_passes_once_its_golden_file_is_there(checkout: tuple[Path, set[str]]) -> None:
    folder, _ = checkout
    test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/extractors/test_mean_colour.py"]
    run(folder, *test, CM3_UPDATE_GOLDEN="1")
    run(folder, *test)
    assert [path.name for path in (folder / "tests/golden").iterdir()] == ["extractor-mean-colour.json"]


def test_the_stage_extracts_vectors_with_it(checkout: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, _ = checkout
    items, manifest = write_items(tmp_path, [{}] * 3), write_images(tmp_path / "images", [plain("red"), None, b"x"])
    settings = '{"modality": "image", "backend": "mean-colour", "square": true}'
    command = ["-m", "extractors.extract", "--spec", f'{{"name": "colours", "settings": {settings}}}']
    files = ["--input", f"items={items}", "--input", f"manifest={manifest}"]
    run(
        folder, *command, *files, "--output", f"features={tmp_path / 'f.parquet'}", "--code", "extract 1, mean-colour 1"
    )
    features = read_features(tmp_path / "f.parquet")
    assert features.status.tolist() == ["ok", "missing", "failed"]
    np.testing.assert_allclose(features.embedding[0], (np.array([220, 20, 20]) / 255) ** 2, atol=1e-6)
    assert features.metadata["preprocessing"] == "none"


def test_the_config_and_its_reference_know_it(checkout: tuple[Path, set[str]]) -> None:
    folder, _ = checkout
    run(folder, "-m", "workflow.reference")
    assert "### backend: mean-colour" in (folder / "config/README.md").read_text()
    code = """
import extractors
from cm3.common.errors import UserError
data = {"modality": "image", "backend": "mean-colour"}
spec = extractors.parse_extractor("mine", data, "mine")
print(spec.code_version(), spec.libraries, spec.memory_mb(100), spec.gpus())
try:
    extractors.parse_extractor("mine", data | {"squared": True}, "mine")
except UserError as error:
    print(error)
"""
    output = run(folder, "-c", code)
    assert "1 ('numpy', 'pillow') 1001.0 0" in output
    assert "mine.squared: unknown key (did you mean 'square'?)" in output
