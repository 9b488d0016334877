"""Code blocks of a document that say which file they belong to, applied to a checkout as a reader would.

A block begins with "```LANGUAGE FILE": the content of a new file, or sections to merge into an existing YAML file. With
"```python FILE NAME" it is lines to add at the end of the dict NAME of FILE.
"""

import re
from pathlib import Path

import yaml
from repository import ROOT


def apply_recipe(document: str, heading: str, folder: Path) -> set[str]:
    """Apply the blocks of a section of docs/`document` to the code in `folder`; return the files that were touched."""
    text = (ROOT / "docs" / document).read_text()
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{document} has no section {heading!r}"
    blocks = re.findall(r"^```\w+ (\S+)(?: (\w+))?\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert blocks, f"{document}, {heading}: no block names its file"
    for file, name, block in blocks:
        path = folder / file
        if name:
            path.write_text(_with_entries(path.read_text(), name, block))
        elif path.suffix == ".yaml":
            path.write_text(
                yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), yaml.safe_load(block)), sort_keys=False)
            )
        else:
            assert not path.exists(), f"{file} exists"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    return {file for file, _, _ in blocks}


def _with_entries(source: str, name: str, entries: str) -> str:
    pattern = re.compile(rf"^({name} = \{{\n.*?)^\}}$", re.MULTILINE | re.DOTALL)
    changed, count = pattern.subn(lambda match: f"{match[1]}{entries}}}", source, count=1)
    assert count == 1, f"no dict {name}"
    return changed


def _merged(base: dict, own: dict) -> dict:
    return base | {
        key: _merged(base[key], value) if isinstance(base.get(key), dict) else value for key, value in own.items()
    }
