"""A digest of the code that a stage runs: it changes with what the code does, not with comments or docstrings."""

import ast
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("cm3", "extractors", "workflow")

# These move bytes, wait, parse arguments or print; what a stage computes does not depend on them.
PLUMBING = frozenset(
    f"cm3.common.{name}" for name in ("cli", "errors", "files", "gpus", "keys", "paths", "progress", "strict")
) | {"extractors.caption.openai_client"}


def code_digest(root: Path, modules: Iterable[str]) -> str:
    """Return 16 hex digits over the code of `modules` and of all of our modules that they import.

    Modules named `config` are left out: they declare values, and values reach a stage through its spec. Package
    `__init__` files only re-export. A module that is imported by a string (a backend) must be named by the caller.

    Args:
        root: the repository's root, where the packages lie.
        modules: dotted names, such as "cm3.training.train".

    Raises:
        ModuleNotFoundError: one of `modules` has no file.
    """
    digest = hashlib.sha256()
    for name in sorted(closure(root, modules)):
        digest.update(f"{name}\n{_module(root, name).code}\n".encode())
    return digest.hexdigest()[:16]


def closure(root: Path, modules: Iterable[str]) -> set[str]:
    """Return `modules` and all that they import from our packages, directly or not, as dotted names."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name in PLUMBING or name.rpartition(".")[2] == "config":
            continue
        found.add(name)
        waiting += _module(root, name).imports
    return found


@dataclass(frozen=True)
class _Module:
    """A module's own modules that it imports, and its code without comments, docstrings and layout."""

    imports: tuple[str, ...]
    code: str


def _module(root: Path, name: str) -> _Module:
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ModuleNotFoundError(f"{name}: no file {path}")
    return _read(root, path, path.stat().st_mtime_ns)


@functools.cache
def _read(root: Path, path: Path, mtime_ns: int) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(root).parts[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module or ""]))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documented = bool(node.body) and _is_docstring(node.body[0])
            node.body = node.body[documented:] or [ast.Pass()]
    ours = (name for name in names if name.partition(".")[0] in PACKAGES)
    imports = tuple(name for name in ours if root.joinpath(*name.split(".")).with_suffix(".py").is_file())
    return _Module(imports, ast.unparse(ast.fix_missing_locations(tree)))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
