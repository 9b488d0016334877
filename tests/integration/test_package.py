"""The installed package: what the wheel holds, and `cm3.fit` in an environment without Snakemake."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from repository import ROOT

SOURCE = ("cm3", "extractors", "pyproject.toml", "README.md", "LICENSE")

FIT = """
import importlib.util
import numpy as np
import cm3

assert all(importlib.util.find_spec(name) is None for name in ("snakemake", "workflow", "matplotlib", "transformers"))
pairs = {"user": [f"u{n // 5}" for n in range(200)], "item": [f"i{(n * 7 + n // 5) % 30}" for n in range(200)]}
vectors = np.random.default_rng(0).normal(size=(30, 8))
shop = cm3.fit(pairs, {"text": vectors}, [f"i{n}" for n in range(30)], {"embedding_dim": 8, "knn_k": 4}, {"epochs": 2})
assert len(cm3.recommend(shop, ["u1"], k=3)[0]) == len(cm3.similar_items(shop, ["i1"], k=3)[0]) == 3
shop.save("saved")
assert cm3.recommend(cm3.load("saved"), ["u1"]) == cm3.recommend(shop, ["u1"])
for name in cm3.__all__:
    getattr(cm3, name)
import torch
print(cm3.__file__, torch.__version__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, since building writes into it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> zipfile.ZipFile:
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_two_packages_and_nothing_else(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cm3", "extractors"}
    ours = {str(path.relative_to(ROOT)) for top in ("cm3", "extractors") for path in (ROOT / top).rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "cm3/reports/pages/templates").iterdir()}
    assert len(templates) > 4
    assert {name for name in names if ".dist-info/" not in name} == ours | templates


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    """What the wheel needs without extras."""
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    return [one for one in map(Requirement, metadata.get_all("Requires-Dist")) if needed(one)]


def needed(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def with_what_they_need(wanted: list[Requirement]) -> list[Distribution]:
    """The installed distributions that `wanted` name, and all that those need."""
    found: dict[str, Distribution] = {}
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop().name).lower()
        if name not in found:
            found[name] = distribution(name)
            wanted += filter(needed, map(Requirement, found[name].requires or ()))
    return list(found.values())


def test_cm3_fits_with_the_dependencies_of_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path):
    """An environment with links to those libraries: the same files, without the gigabytes."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    wheel.extractall(site)
    for one in with_what_they_need(requirements(wheel)):
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    printed = fit(tmp_path)
    assert printed.startswith(str(site))


@pytest.mark.skipif("CM3_TEST_NETWORK" not in os.environ, reason="installs 3 GB; set CM3_TEST_NETWORK=1")
def test_pip_installs_it_with_another_torch(source: Path, tmp_path: Path):
    uv = Path(sys.executable).parent / "uv"
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, source, f"torch<{pinned}"], check=True)
    assert fit(tmp_path).split()[-1] != distribution("torch").version


def fit(folder: Path) -> str:
    """Fit a model with the interpreter of an environment; return the package's path and the version of torch."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [folder / "env/bin/python", "-c", FIT]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
