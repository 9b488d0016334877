"""Links resolve, the tools accept the documented commands, and files that other programs read are well-formed."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePath
from urllib.parse import unquote

import pytest
import yaml
from repository import ROOT

from workflow.plan.config import Config, load_config
from workflow.prune import read_config
from workflow.targets import unknown_target


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


def lines_of_code(program: str) -> list[tuple[str, list[str]]]:
    """Commands of a program in documents, in lines of code and in backticks, as words, without comments and variables."""
    pattern = rf"^(?: {{4}}|\$ )?((?:\w+=\S+ +)*{program} .*)$|`((?:\w+=\S+ +)*{program} [^`\n]+)`"
    found = []
    for document in documents():
        for groups in re.findall(pattern, document.read_text(), re.MULTILINE):
            line = "".join(groups)
            # placeholders, and one-liners that go on in the next line
            if re.search(r"\{\w*\}|\.\.\.| -c |\b[A-Z]{3,}\b", line):
                continue
            words = shlex.split(line, comments=True)
            found.append((document.name, words[words.index(program.replace("\\", "")) + 1 :]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """The documented calls of snakemake."""
    return [
        (document, words) for document, words in lines_of_code("snakemake") if words[0].startswith(("-", "results/"))
    ]


@cache
def snakemake_parser():
    from snakemake.cli import get_argument_parser

    return get_argument_parser()


EXAMPLES = (("mine",), ("my-shop",), ("my-shop-study",), ("my-study",), ("shop",), ("hm",))
"""Experiments and studies of the reader, or of a config file that a page shows."""


def named_config(files: Sequence[Path], words: Sequence[str]) -> Config:
    """The shipped configuration with files and words of the command line over it."""
    return load_config(read_config(files), files, overrides=words)


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: " ".join(value)[:60])
def test_snakemake_takes_the_documented_command(document: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CM3_TEST_DATA", os.environ.get("CM3_TEST_DATA", "data"))  # of benchmarks/hm.yaml
    options = snakemake_parser().parse_args(words)
    assert options.workflow_profile is None or (ROOT / options.workflow_profile).is_dir(), document
    assert "--profile" not in words, f"{document}: --profile leaves profiles/default on top"
    files = [Path(file) for file in options.configfile or ()]
    assert not [file for file in files if file.parts[0] == "results"], (
        f"{document}: a target is taken for a config file"
    )
    if all(file.exists() for file in files):
        config = named_config(files, options.config or [])
        shipped = [name for name in sorted(options.targets) if PurePath(name).parts[1:2] not in EXAMPLES]
        assert unknown_target(config, shipped) is None, document


@pytest.mark.parametrize(("document", "words"), lines_of_code(r"\./run"), ids=lambda value: " ".join(value)[:60])
def test_run_takes_the_documented_task(document: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = named_config([], [])
    task, *rest = words
    tasks = re.findall(r"^    ([a-z][a-z |]*)\)", (ROOT / "run").read_text(), re.MULTILINE)
    if task == "report":
        assert rest[0] in config.experiments or (rest[0],) in EXAMPLES, document
    elif task == "study":
        assert rest[0] in config.studies or (rest[0],) in EXAMPLES, document
    else:
        assert task in config.experiments or (task,) in EXAMPLES or task in " | ".join(tasks).split(" | "), document


NOT_RUN = {
    "apptainer": "needs a container runtime",
    "curl": "asks a server",
    "docker": "needs a container runtime",
    "git": "the address is the reader's",
    "hf": "downloads weights",
    "pip": "changes the environment of the tests",
    "uv": "changes the environment of the tests",
    "vllm": "needs a GPU",
    **dict.fromkeys(("cd", "cp", "export", "mkdir", "source"), "the shell's own, with files of the reader"),
}
"""Programs in documents that no test runs or parses, with the reason."""

CHECKED = {"snakemake", "./run", "python", "bash"}
"""Programs whose documented calls are checked: options, targets, tasks, modules and scripts."""


def test_every_documented_program_is_checked_or_not_run_for_a_reason():
    """Lines of code are commands where their first word, after variables, is the name of a program."""
    found = set()
    for document in documents():
        text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
            word = re.sub(r"^(\w+=\S+ +)+", "", line).split()[0]
            if shutil.which(word) or word in CHECKED | NOT_RUN.keys():
                found.add(word)
    assert found - CHECKED - NOT_RUN.keys() == set()
    assert found > {"snakemake", "./run", "pip"}


@pytest.mark.parametrize(("document", "words"), lines_of_code("bash"), ids=lambda value: " ".join(value)[:60])
def test_documented_shell_scripts_exist(document: str, words: list[str]):
    assert (ROOT / words[0]).is_file(), document


def test_documents_show_commands():
    assert len(commands()) > 15


def test_documented_options_of_benchmarks_exist():
    texts = [document.read_text() for document in documents()]
    calls = [call for text in texts for call in re.findall(r"\bpython (benchmarks/\w+\.py)((?:\s[^`#]+)?)", text)]
    assert len(calls) > 8
    for script, words in calls:
        source = (ROOT / script).read_text()
        for option in re.findall(r"(?<!\S)--[a-z-]+", words.partition(";")[0].partition(", then")[0]):
            assert f'"{option}"' in source or f'"{option[2:]}"' in source, f"{script} {option}"


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
    bibtex = re.search(r"^```bibtex\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert f"version = {{{project['version']}}}" in bibtex and f"{{{citation['title']}}}" in bibtex
    assert "2508.01226" in citation["references"][0]["identifiers"][0]["value"]
    assert re.search(rf"^## {re.escape(project['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_workflow_catalog_finds_what_it_reads():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    ways = usage["software-stack-deployment"]
    assert ways["conda"] and ways["apptainer"] and ways["report"] is True
    # The spelling of earlier versions of the catalog says the same.
    assert ways["singularity"] == ways["apptainer"] and ways["singularity+conda"] == ways["apptainer+conda"]
    assert usage["report"] is ways["report"]
    for name in ("workflow/Snakefile", "config/README.md", "environment.yml", "LICENSE", "README.md"):
        assert (ROOT / name).is_file(), name
    assert re.search(r"^container:", (ROOT / "workflow/Snakefile").read_text(), re.MULTILINE)


def steps(workflow: str, job: str) -> list[str]:
    """The commands that a job of a GitHub workflow runs."""
    jobs = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())["jobs"]
    return [step["run"] for step in jobs[job]["steps"] if "run" in step]


def test_continuous_integration_runs_what_a_contributor_runs():
    assert steps("ci", "everything") == [".ci/run"]
    assert steps("ci", "unit") == ["./run test unit"]
    for script in (".ci/run", "run"):
        assert (ROOT / script).stat().st_mode & 0o111
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    called = re.findall(r"^\./run .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert called == ["./run test", "./run lint"]


def test_a_release_checks_the_version_of_this_repository(tmp_path: Path):
    check = steps("release", "build")[0]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for tag, passes in ((f"v{version}", True), (f"v{version}1", False)):
        done = subprocess.run(["bash", "-e", "-c", check], cwd=ROOT, env=os.environ | {"GITHUB_REF_NAME": tag})
        assert (done.returncode == 0) is passes, tag


def test_commit_hooks_are_the_linters_that_run_lint_calls():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    lint = re.search(r"^    lint\)(.*?);;", (ROOT / "run").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert tools == {"ruff", "mypy", "lint-imports", "snakefmt"} <= set(lint.split())


def test_parts_of_the_suite_have_the_same_names_everywhere():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    parts = [marker.partition(":")[0] for marker in markers][:5]
    assert " | ".join(parts) in (ROOT / "run").read_text()
    assert ", ".join(parts[:4]) in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cores", "2"], "the name of an experiment comes first"),
        (["report"], "./run report NAME"),
        (["study", "-n"], "./run study NAME"),
        (
            ["sample", "--configfile", "mine.yaml", "results/x/metrics.json"],
            "--configfile takes results/x/metrics.json",
        ),
        (["sample", "--config", "a=1", "results/x/metrics.json"], "--config takes results/x/metrics.json"),
    ],
)
def test_mistakes_in_the_words_of_run_are_one_line(words: list[str], message: str):
    done = subprocess.run([ROOT / "run", *words], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
