"""Keys that are given twice in a YAML file of settings, of which YAML readers silently keep the last."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from cm3.common.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"
# The parser in C, where PyYAML was built with it: every job parses the configuration.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def default_config() -> Path:
    """Return config/config.yaml of the working directory, else that of the repository, as the Snakefile reads it."""
    own = Path("config/config.yaml")
    return own if own.exists() else Path(__file__).parents[2] / own


def check_duplicate_keys(files: Iterable[Path]) -> None:
    """Raise a UserError with all keys that are given twice in one mapping of `files`, with both lines.

    Merge keys (`<<`) may be repeated, and a key may override one of a merged mapping. Files that do not exist or are not
    YAML are skipped: whoever reads their content reports that.
    """
    faults = [fault for path in dict.fromkeys(Path(file).resolve() for file in files) for fault in _faults(path)]
    if faults:
        raise UserError("\n".join(faults))


def _faults(path: Path) -> tuple[str, ...]:
    try:
        state = path.stat()
        return _faults_of(path, state.st_mtime_ns, state.st_size)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ()


@functools.lru_cache(maxsize=64)
def _faults_of(path: Path, mtime_ns: int, size: int) -> tuple[str, ...]:
    with path.open(encoding="utf-8-sig") as file:
        root = yaml.compose(file, Loader=_LOADER)
    found = sorted(_duplicates(root), key=lambda fault: fault[2].start_mark.line)
    return tuple(
        f"{path}, line {again.start_mark.line + 1}: duplicate key {key!r}, first in line {first.start_mark.line + 1}; "
        "keep one of them, or give them different names"
        for key, first, again in found
    )


def _duplicates(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (path of the key, first, second) of the keys that are given twice in one mapping."""
    waiting: list[tuple[str, yaml.Node | None]] = [("", root)]
    seen: set[int] = set()  # an alias is the node of its anchor
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        below: list[tuple[str, yaml.Node | None]] = []
        if isinstance(node, yaml.SequenceNode):
            below = [(f"{path}[{place}]", value) for place, value in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            keys: dict[tuple[str, str], yaml.Node] = {}
            for key, value in node.value:
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
                key_path = f"{path}.{name}".strip(".")
                below.append((key_path, value))
                if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                    continue
                first = keys.setdefault((key.tag, name), key)
                if first is not key:
                    yield key_path, first, key
        waiting += reversed(below)  # in the order of the file, so that an alias comes after its anchor
