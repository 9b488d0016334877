"""Links resolve, documented commands are ones that the tools take, and the files that others read are well-formed."""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from repository import ROOT


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    named = [ROOT / name for name in listed.stdout.split()] or sorted(ROOT.glob("*.md")) + sorted(
        ROOT.glob("docs/*.md")
    )
    return sorted(path for path in named if path.exists())


def anchors(text: str) -> set[str]:
    """The names that a heading can be linked by: lower case, words joined by hyphens, punctuation left out."""
    headings = re.findall(r"^#+ +(.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{document.name}: {link}"


def test_the_index_lists_every_document():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def commands() -> list[tuple[str, list[str]]]:
    """Lines of code in documents that call snakemake, as words, without comments and variables before it."""
    found = []
    for document in documents():
        for line in re.findall(r"^(?: {4}|\$ )?((?:\w+=\S+ +)*snakemake .*)$", document.read_text(), re.MULTILINE):
            # placeholders, and one-liners that go on in the next line
            if "{" in line or "..." in line or " -c " in line:
                continue
            words = shlex.split(line, comments=True)
            found.append((document.name, words[words.index("snakemake") + 1 :]))
    return found


@cache
def snakemake_parser():
    from snakemake.cli import get_argument_parser

    return get_argument_parser()


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: " ".join(value)[:60])
def test_snakemake_takes_the_documented_command(document: str, words: list[str]):
    options = snakemake_parser().parse_args(words)
    assert options.workflow_profile is None or (ROOT / options.workflow_profile).is_dir(), document
    assert "--profile" not in words, f"{document}: --profile leaves profiles/default on top"


def test_documents_show_commands():
    assert len(commands()) > 15


def test_documented_modules_and_scripts_exist():
    texts = [document.read_text() for document in documents()]
    modules, scripts = (
        {name for text in texts for name in re.findall(pattern, text)}
        for pattern in (r"\bpython -m ([\w.]+\w)", r"\bpython (benchmarks/\w+\.py)\b")
    )
    assert modules and scripts
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    assert not [name for name in scripts if not (ROOT / name).exists()]


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "2508.01226" in citation["references"][0]["identifiers"][0]["value"]
    assert re.search(rf"^## {re.escape(project['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_workflow_catalog_finds_what_it_wants():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    ways = usage["software-stack-deployment"]
    assert ways["conda"] and ways["singularity"] and usage["report"] is True
    for name in ("workflow/Snakefile", "config/README.md", "environment.yml", "LICENSE", "README.md"):
        assert (ROOT / name).is_file(), name
    assert re.search(r"^container:", (ROOT / "workflow/Snakefile").read_text(), re.MULTILINE)


def test_continuous_integration_runs_what_a_contributor_runs():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"]).returncode == 0
