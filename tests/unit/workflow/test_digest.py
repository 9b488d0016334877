"""The code digest follows what code does: not its comments, and not the code of other stages."""

import ast
import shutil
from pathlib import Path

import pytest
from repository import ROOT

from workflow.plan.digest import PACKAGES, closure, code_digest

CODE = '''"""Says what it is."""
import cm3.other


class A:
    """A class."""

    def f(self, x):
        """Double x."""
        # twice
        return 2 * x
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "cm3").mkdir()
    (tmp_path / "cm3/one.py").write_text(CODE)
    (tmp_path / "cm3/other.py").write_text("def g():\n    from cm3 import late\n    return late.VALUE\n")
    (tmp_path / "cm3/late.py").write_text("from . import config\nVALUE = 1\n")
    (tmp_path / "cm3/config.py").write_text("DEFAULT = 1\n")
    (tmp_path / "cm3/unrelated.py").write_text("X = 1\n")
    return tmp_path


def test_imports_are_followed_even_inside_functions_but_not_into_config(tree: Path):
    assert closure(tree, ["cm3.one"]) == {"cm3.one", "cm3.other", "cm3.late"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("one", "Says what it is.", "Says it otherwise."),
        ("one", "# twice", "# two times"),
        ("one", "Double x.", "Return 2x."),
        ("one", "2 * x", "(2   *\n        x)"),
        ("config", "DEFAULT = 1", "DEFAULT = 2"),
        ("unrelated", "X = 1", "X = 2"),
    ],
)
def test_these_edits_change_nothing(tree: Path, file: str, old: str, new: str):
    before = code_digest(tree, ["cm3.one"])
    path = tree / "cm3" / f"{file}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert code_digest(tree, ["cm3.one"]) == before


@pytest.mark.parametrize(("file", "old", "new"), [("one", "2 * x", "3 * x"), ("late", "VALUE = 1", "VALUE = 2")])
def test_these_edits_change_it(tree: Path, file: str, old: str, new: str):
    before = code_digest(tree, ["cm3.one"])
    path = tree / "cm3" / f"{file}.py"
    path.write_text(path.read_text().replace(old, new))
    assert code_digest(tree, ["cm3.one"]) != before


def test_a_module_without_a_file_is_an_error(tree: Path):
    with pytest.raises(ModuleNotFoundError, match=r"cm3\.absent"):
        code_digest(tree, ["cm3.absent"])


def test_stages_share_no_code_that_would_rerun_each_other():
    assert "cm3.model.losses" in closure(ROOT, ["cm3.training.train"])
    for stage in ("cm3.evaluation.evaluate", "cm3.similarity.stage"):
        assert not {"cm3.model.losses", "cm3.model.model", "cm3.training.train"} & closure(ROOT, [stage])
    assert "cm3.evaluation.metrics" not in closure(ROOT, ["cm3.training.train"])
    backends = closure(ROOT, ["extractors.extract"])
    assert (
        not {"extractors.image.descriptor", "extractors.image.open_clip", "extractors.text.sentence_transformers"}
        & backends
    )


@pytest.mark.parametrize("name", ["directau", "bm3"])
def test_which_items_a_baseline_contrasts_is_code(tmp_path: Path, name: str):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    modules = ["cm3.baselines.train", f"cm3.baselines.networks.{name}"]
    before = code_digest(tmp_path, modules)
    path = tmp_path / f"cm3/baselines/networks/{name}.py"
    path.write_text(path.read_text().replace('contrast = "positive"', 'contrast = "negative"'))
    assert code_digest(tmp_path, modules) != before == code_digest(ROOT, modules)


def test_no_module_imports_a_name_through_a_package():
    """`from cm3 import knn` would hide the module behind the package's lazy exports from the digest."""

    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                    for alias in node.names:
                        assert (ROOT / node.module / f"{alias.name}.py").exists(), f"{path}: {alias.name}"
