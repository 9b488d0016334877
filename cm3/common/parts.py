"""Parts of the pipeline that can be replaced or added (models, backends, sources, metrics), and the version of their code.

A part states its version by hand. The version is recorded with every output and decides, together with the settings,
whether an output is up to date. Golden outputs (`tests/golden/`) fail when an output changes and the version does not.
"""

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import ClassVar


class Part:
    """Base of every class that a registry lists.

    Attributes:
        version: raised by hand when the part gives other outputs for the same settings and inputs. None while the part
            is being written: a digest of its modules is used instead, so that every edit of them reruns their outputs.
        libraries: distributions that the outputs depend on; their versions are recorded with the outputs.
        code_modules: modules besides the part's own that the digest covers while `version` is None.
    """

    version: ClassVar[int | None] = None
    libraries: ClassVar[tuple[str, ...]] = ()
    code_modules: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def code_version(cls) -> str:
        """Return the version as text, or a digest of the part's modules where it has none."""
        if cls.version is not None:
            return str(cls.version)
        return "dev-" + digest_of_modules(cls.__module__, *cls.code_modules)


def digest_of_modules(*modules: str) -> str:
    """Return 12 hex digits over the syntax of modules; comments, docstrings and layout do not count.

    Raises:
        ModuleNotFoundError: a module has no source file.
    """
    digest = hashlib.sha256()
    for name in sorted(set(modules)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name}: no source file")
        path = Path(spec.origin)
        digest.update(f"{name}\n{_syntax(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:12]


@functools.cache
def _syntax(path: Path, mtime_ns: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))
