"""Hooks of MkDocs: the site shows the Markdown files of the repository, and its links are those that work on GitHub.

MkDocs knows the files of docs/ only. These hooks add the Markdown files of other folders, the notebook, and every other
file that a page links to, as a page with its text.
"""

import json
import posixpath
import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "docs/notebook.ipynb": "notebook.md",
    "config/README.md": "configuration.md",
    "benchmarks/RESULTS.md": "measured.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages that are made from files of the repository."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".smk": "python"}
CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\(|<img [^>]*src=\"|<a [^>]*href=\")([^)\s\"]+)")
BLOCK_OF_FILE = re.compile(r"^```(\w+) (\S.*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from other files, and take out what they replace."""
    for source, uri in PAGES.items():
        replaced = files.get_file_from_path(posixpath.relpath(source, "docs"))
        if replaced:
            files.remove(replaced)
        files.append(File.generated(config, uri, content=_text(ROOT / source)))
    for page in list(files.documentation_pages()):
        for path in _linked_files(page.content_string, _source(page.src_uri)):
            uri = _uri(path)
            if not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, content=_listing(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text with links that fit the site, and the files that blocks of code belong to as their titles."""
    rewritten = _outside_code(partial(_rewritten, page.file.src_uri), markdown)
    return BLOCK_OF_FILE.sub(r'```\1 title="\2"', rewritten)


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return _notebook(json.loads(text)) if path.suffix == ".ipynb" else text


def _source(uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    return next((source for source, made in PAGES.items() if made == uri), f"docs/{uri}")


def _uri(path: str) -> str:
    """Return the page or file of the site that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _target(link: str, source: str) -> tuple[str, str]:
    """Return the path in the repository that a link of a file means, and its anchor; no path for other links."""
    path, _, anchor = unquote(link).partition("#")
    if not path or re.match(r"[a-z]+:", link):
        return "", anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), anchor


def _linked_files(markdown: str, source: str) -> set[str]:
    """Return the files outside of docs/ that a page links to and that have no page yet."""
    links = [link for _, link in LINK.findall(CODE.sub("", markdown))]
    paths = {_target(link, source)[0] for link in links} - {""}
    return {path for path in paths if path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file()}


def _rewritten(uri: str, text: str) -> str:
    def link(match: re.Match[str]) -> str:
        path, anchor = _target(match[2], _source(uri))
        if not path:
            return match[0]
        if not (ROOT / path).is_file():
            raise PluginError(f"{_source(uri)}: no file {match[2]}")
        found = posixpath.relpath(_uri(path), posixpath.dirname(uri) or ".")
        return match[1] + (f"{found}#{anchor}" if anchor else found)

    return LINK.sub(link, text)


def _outside_code(change: Any, markdown: str) -> str:
    parts, end = [], 0
    for block in CODE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])


def _listing(path: str) -> str:
    """Return a page with the text of a file."""
    fence = "`````"
    return (
        f"# {path}\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{(ROOT / path).read_text('utf-8')}\n{fence}\n"
    )


def _notebook(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown, with its outputs."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{data['image/png'].strip()})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"
