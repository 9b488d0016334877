"""The pages of docs/ that show messages, code and diagrams: each is what the code says and does."""

import ast
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from wsgiref.simple_server import make_server

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from library_shop import QUICK, SMALL, shop
from notebook import run_notebook
from repository import ROOT
from training_shop import one_thread

import cm3

__all__ = ["one_thread"]  # used by every test here

DOCS = ROOT / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def templates(source: str) -> Iterator[str]:
    """Texts in a module, with "…" where a value is put in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_each_message_of_the_page_on_failures_is_in_the_code():
    files = [path for folder in ("cm3", "extractors", "workflow") for path in (ROOT / folder).rglob("*.py")]
    texts = [text for path in files for text in templates(path.read_text(encoding="utf-8"))]
    texts.append((ROOT / "run").read_text())
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 30
    missing = []
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            missing.append(message)
    assert not missing


def test_each_message_has_a_remedy():
    sections = re.split(r"^###? .*$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    headings = re.findall(r"^(###?) .*$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert all(len(text.split()) > 6 for heading, text in zip(headings, sections[1:], strict=True) if heading == "###")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs, features, items = shop()
    folder = tmp_path_factory.mktemp("serving") / "my-shop"
    cm3.fit(pairs, features, items, SMALL, QUICK | {"epochs": 5}).save(folder)
    return folder


def module_of(code: str, place: Path) -> ModuleType:
    place.write_text(code)
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documented_web_service_answers(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODEL", str(trained))
    service = module_of(blocks("serving.md")[0], tmp_path / "serve.py")
    with make_server("127.0.0.1", 0, service.app) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask(path: str) -> list[dict[str, object]]:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=120) as answer:
                return json.loads(answer.read())

        model = cm3.load(trained)
        found = ask("/recommend?user=u1&k=3")
        assert [one["item"] for one in found] == [item for item, _ in cm3.recommend(model, "u1", k=3)]
        assert len(ask("/similar?item=i1")) == 10
        visitor = ask("/visitor?item=i1&item=i3&k=2")
        assert [one["item"] for one in visitor] == [item for item, _ in cm3.recommend_for(model, ["i1", "i3"], 2)]
        for wrong in ("/recommend?user=nobody", "/recommend", "/similar?item=i1&k=many", "/similar?item=i1&k=-1"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(wrong)
            assert refused.value.code == 400 and "error" in json.loads(refused.value.read()), wrong
        server.shutdown()


def test_the_documented_index_agrees_with_exact_search(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    monkeypatch.chdir(trained.parent)
    approximate = module_of(blocks("serving.md")[1], tmp_path / "search.py")
    model = cm3.load(trained)
    for user in ("u1", "u2", "u59"):
        exact = cm3.recommend(model, user, k=5)
        found = approximate.recommend(user, k=5)
        assert [item for item, _ in found] == [item for item, _ in exact]
        assert [score for _, score in found] == pytest.approx([score for _, score in exact], abs=1e-4)


def test_the_test_by_hand_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    for shift, experiment in enumerate(("hm", "hm-lightgcn")):
        folder = tmp_path / f"results/{experiment}/runs/a"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"recall@20": [0.5, 0.25 * shift, 1.0]}), folder / "per_user.parquet")
    module_of(blocks("statistics.md")[0].replace("[...]", '["a"]'), tmp_path / "by_hand.py")
    mean, _ = map(float, capsys.readouterr().out.split())
    assert mean == pytest.approx(-0.25 / 3)


def test_a_baseline_is_trained_without_snakemake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(12), 5), np.concatenate([rng.permutation(15)[:5] for _ in range(12)])
    labels = np.tile([0, 0, 0, 1, 2], 12).astype(np.int8)
    (tmp_path / "processed/hm").mkdir(parents=True)
    oracle.write_interactions(tmp_path / "processed/hm", users, items, labels, 12, 15)
    code = blocks("baselines.md")[0].replace("seed=1", "seed=1, epochs=2, device='cpu'")
    module_of(code, tmp_path / "without_snakemake.py")
    assert {path.name for path in (tmp_path / "out").glob("*.parquet")} == {
        "user_embeddings.parquet",
        "item_embeddings.parquet",
    }


def test_the_example_of_the_library_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = vars(module_of(blocks("library.md")[0], tmp_path / "example.py"))
    assert len(names["one"]) == len(names["many"][1]) == 10 and len(names["near"]) == 5
    assert "i5" not in dict(names["visitor"]) and "new" in names["shop"].item_ids
    assert {"recall@10", "ndcg@10"} <= names["metrics"].keys() and (tmp_path / "my-shop").is_dir()


def test_the_notebook_runs_and_holds_its_outputs():
    path = DOCS / "notebook.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert 'find_spec("cm3") is None' in "".join(cells[0]["source"])
    assert path.stat().st_size < 150_000

    def kinds(outputs: list[dict]) -> list[str]:
        return [output["output_type"] for output in outputs]

    ran = run_notebook(path)
    assert [kinds(outputs) for outputs in ran] == [kinds(cell["outputs"]) for cell in cells]
    assert ran[-1][0]["data"]["text/plain"] == ["True"]
    shares = [float(line.split()[-1]) for line in "".join(ran[-2][0]["text"]).splitlines()]
    assert shares[0] > max(shares[1:])  # content helps


Edges = set[tuple[str, str]]


def edges(text: str) -> Edges:
    """Arrows of a Mermaid flowchart, by the word that a node's label begins with."""
    names = dict(re.findall(r"(\w+)\[[(\"]?(\w+)", text))
    chains = [re.findall(r"(\w+)(?:\[.*?\])?(?: -->|$)", line) for line in text.splitlines() if "-->" in line]
    arrows = [arrow for chain in chains for arrow in itertools.pairwise(chain)]
    return {(names.get(one, one), names.get(other, other)) for one, other in arrows}


def reduced(arrows: Edges) -> Edges:
    """Without the arrows that follow from others."""

    def follow(name: str) -> set[str]:
        after = {other for one, other in arrows if one == name}
        return after.union(*(follow(other) for other in after))

    return {
        (one, other) for one, other in arrows if not any(other in follow(mid) for start, mid in arrows if start == one)
    }


@pytest.mark.integration
def test_the_rule_graph_is_that_of_snakemake():
    (drawn,) = blocks("how-it-works.md", "mermaid")
    command = ["snakemake", "--rulegraph", "mermaid-js", "results/baby/report.html"]
    assert " ".join(command) in (DOCS / "how-it-works.md").read_text()
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert edges(drawn) == reduced(edges(done.stdout)) and len(edges(drawn)) > 8


def test_the_diagram_of_the_readme_shows_rules_that_exist():
    (drawn,) = re.findall(r"^```mermaid\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    rules = {
        rule
        for file in (ROOT / "workflow/rules").glob("*.smk")
        for rule in re.findall(r"^rule (\w+):", file.read_text(), re.MULTILINE)
    }
    shown = {name for edge in edges(drawn) for name in edge}
    assert shown - rules == {"raw"}


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_a_broken_link(tmp_path: Path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    named = {path.stem for path in DOCS.glob("*.md")} - {"README"}
    assert named <= pages and {"configuration", "measured", "notebook", "pages"} <= pages
    code = (tmp_path / "site/plugins/index.html").read_text()
    assert 'href="../source/cm3/baselines/lightgcn.py/"' in code
    assert (tmp_path / "site/source/cm3/baselines/lightgcn.py/index.html").is_file()
    assert time.monotonic() - began < 300
    shutil.rmtree(tmp_path / "site")
