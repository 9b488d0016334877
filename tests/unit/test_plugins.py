"""Models and extractors of other packages: the example of docs/plugins.md, installed without a network."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repository import ROOT

PAGE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
TOML = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0]
MODULE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def install(folder: Path, toml: str = TOML, module: str = MODULE) -> Path:
    """Write what `pip install --target` writes: the module, and the metadata of its distribution."""
    project = tomllib.loads(toml)["project"]
    metadata = folder / "shop_models-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join([*lines, ""]))
    (folder / "shop_models.py").write_text(module)
    return folder


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_documented_package_is_used_by_name(tmp_path: Path):
    config = """
import copy
from checkout import SMALL
from workflow.plan.config import load_config
config = copy.deepcopy(SMALL)
config["extractors"]["my-letters"] = {"modality": "text", "backend": "letters"}
config["experiments"]["counts"] = {"dataset": "shop", "model": {"name": "co-occurrence"}}
config["experiments"]["spelt"] = {"dataset": "shop", "modalities": {"text": "my-letters"}}
print(sorted(load_config(config).experiments))
"""
    done = python(USE + config, install(tmp_path), ROOT / "tests/support")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 8) [('pot', ")
    assert "'counts'" in done.stdout and "'spelt'" in done.stdout


@pytest.mark.parametrize(("group", "name"), [("models", "ease"), ("extractors", "timm")])
def test_a_name_that_is_taken_is_an_error(tmp_path: Path, group: str, name: str):
    toml = TOML.replace("co-occurrence =" if group == "models" else "letters =", f"{name} =")
    code = "from cm3.model_registry import models; from extractors.registry import backends; models(); backends()"
    done = python(code, install(tmp_path, toml))
    assert f"shop-models: its entry point '{name}' of cm3.{group} has the name of another part" in done.stderr


def test_without_such_packages_the_registries_are_those_of_the_repository():
    code = """
from cm3.model_registry import MODELS, models
from extractors.registry import BACKENDS, backends
print(models() == MODELS, backends() == BACKENDS)
"""
    assert python(code).stdout.split() == ["True", "True"]
