"""The page of an experiment: its numbers, neighbours, users, images and troubles, against the files that it is made of."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import page_shop
import pyarrow.parquet as pq
import pytest
from training_shop import one_thread

from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.files import read_json, write_json
from cm3.common.interactions import read_interactions
from cm3.common.tables import SIMILARITY, read_table
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.reports.pages.experiment_page import experiment_page
from cm3.reports.pages.page import relative
from cm3.reports.pages.popularity import popularity_metrics
from cm3.reports.pages.rivals import rivals
from cm3.reports.pages.settings import overview, warnings_of

__all__ = ["one_thread"]  # used by every test here


class Page(HTMLParser):
    """The elements of a page and the text of each, scripts and styles apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._inside: list[str] = []
        self._cell = False
        self.scripts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts += [""] * (tag == "script")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()
        if tag in ("td", "th", "tr", "table"):
            self._cell = False

    def handle_data(self, data):
        if self._inside:
            if self._inside[-1] == "script":
                self.scripts[-1] += data
            return
        self.text += data
        if self._cell and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, first):
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].strip() == first)


MARKED = {"changed": ["training.lr"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    inputs = page_shop.experiment(folder)
    facts = experiment_page(
        inputs=inputs, page_output=folder / "report.html", figures_output=folder / "figures", **MARKED
    )
    return inputs, folder, facts, Page(folder / "report.html")


def test_the_tables_hold_the_metrics_of_metrics_json(made):
    inputs, _, _, page = made
    metrics = read_json(inputs["metrics"])
    for name, row in (("recall", "Recall"), ("ndcg", "NDCG"), ("mrr", "MRR")):
        cells = page.row(row)[1:]
        assert cells == [
            f"{metrics['test'][f'{name}@{k}']:.4f} {metrics['valid'][f'{name}@{k}']:.4f}" for k in (5, 10, 20)
        ]
    for way in ("score dot, mask train+valid", "score cosine, mask train"):
        shown = {"score dot, mask train+valid": "dot product, excluding items of training and validation"}
        cells = page.row(shown.get(way, "cosine, excluding items of training"))
        assert cells[1] == f"{metrics['detail']['test'][way]['recall@20']:.4f}"
    cold = page.row("cold items (without training interactions)")
    assert int(cold[2]) == metrics["detail"]["items"]["cold"]["interactions"]


def test_the_page_tells_settings_keys_versions_and_how_to_make_the_numbers_again(made):
    text = made[3].text
    for told in (
        "results/trial/metrics.json",
        "0123456789ab",
        "python",
        "3.11",
        "package:minilm",
        "lr",
        "0.02",
        "1 min 12 s",
        "1.2 GB",
    ):
        assert told in text
    assert "dropped: 2 by repeated pairs, 7 by the 5-core" in " ".join(text.split())


def test_the_overview_states_what_a_reduction_keeps(made):
    metrics = read_json(made[0]["metrics"])
    modality = metrics["config"]["modalities"][0]
    plain = dict(overview(metrics))[modality.capitalize()]
    metrics["reduced"] = {modality: {"from": 384, "dim": 128, "explained_variance": 0.8961}}
    found = dict(overview(metrics))[modality.capitalize()]
    assert found == f"{plain}; 384 numbers reduced to 128 (89.6 % of the variance)"


def test_settings_that_differ_from_the_defaults_are_marked(made):
    page = made[3]
    assert "Settings that differ from the defaults: training.lr = 0.02." in " ".join(page.text.split())
    (marked,) = re.findall(r'<div class="changed"><dt>(.*?)</dt>', page.source)
    assert marked == "lr"


def test_time_machine_and_commit_are_those_of_the_records(made, tmp_path):
    inputs = dict(made[0])
    for stage in ("train", "evaluate"):
        record = {"started": 1.7e9, "machine": "Z80, 1 cores, 64 GB, Linux", "device": "cpu", "commit": f"{stage}c0de"}
        inputs[f"record.{stage}"] = tmp_path / f"{stage}.stage.json"
        write_json(inputs[f"record.{stage}"], record)
    experiment_page(inputs=inputs, page_output=tmp_path / "report.html", figures_output=tmp_path / "figures")
    facts = dict(re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd>", Page(tmp_path / "report.html").source))
    assert facts["Trained"] == "14 November 2023, 22:13 UTC"
    assert facts["Duration"].startswith("training 1 min 12 s, all stages ")
    assert facts["Machine"] == "Z80, 1 cores, 64 GB, Linux, on cpu"
    assert facts["Commit"] == "trainc0de, evaluated with evaluatec0de"


@pytest.mark.parametrize("mask", ["train", "train+valid"])
def test_the_most_popular_items_are_measured_as_their_model_would_be(made, tmp_path, mask):
    inputs = made[0]
    tables = {name: inputs[name] for name in ("interactions", "items", "users")}
    data = read_interactions(**tables)
    counts = np.asarray(data.matrix("train").sum(0)).ravel()
    vectors = {"user": np.ones((len(data.user_ids), 1)), "item": counts[:, None]}
    for name, ids in (("user", data.user_ids), ("item", data.item_ids)):
        write_embeddings(tmp_path / f"{name}.parquet", f"{name}_id", ids, vectors[name].astype(np.float32), {})
    outputs = {f"{name}_output": tmp_path / name for name in ("metrics", "per_user", "recommendations")}
    exported = {f"{name}_embeddings": tmp_path / f"{name}.parquet" for name in vectors}
    expected = evaluate(**tables, files=exported, **outputs, settings=Evaluation(ks=[5, 10, 20], mask=mask))["test"]
    found = popularity_metrics(data, [5, 10, 20], mask)
    assert found == pytest.approx(expected, abs=1e-12) and len(set(counts)) < len(counts), "ties are ranked alike"


def test_most_popular_items_and_models_of_studies_are_next_to_the_metrics(made, tmp_path, monkeypatch):
    inputs = made[0]
    metrics = read_json(inputs["metrics"])
    data = read_interactions(*(inputs[name] for name in ("interactions", "items", "users")))
    popular = popularity_metrics(data, [20], "train")["recall@20"]
    cells = made[3].row("MostPop most popular items")
    assert cells[1].split(" ", 1)[0] == f"{popular:.4f}"
    assert cells[1].endswith(relative(metrics["test"]["recall@20"], popular))

    monkeypatch.chdir(tmp_path)
    ease = {"model": "ease", "runs": ["e" * 12], "metrics": {"recall@20": {"mean": 0.9}}}
    pop = {"model": "mostpop", "runs": ["f" * 12], "metrics": {"recall@20": {"mean": 0.1}}}
    write_json(
        Path("results/mine/comparison.json"), {"settings": {"mask": "train"}, "experiments": {"e": ease, "p": pop}}
    )
    planned = {"mine": {"e": ["e" * 12], "p": ["f" * 12]}, "absent": {"e": ["e" * 12]}}

    def names(metrics, studies):
        return [one["name"] for one in rivals(metrics, data, ["recall@20", "ndcg@20"], studies)]

    assert names(metrics, planned) == ["e", "p"]
    assert set(names(metrics, {"mine": {"e": ["0" * 12]}})) == {"MostPop"}, "of other settings or another split"
    assert set(names(metrics | {"mask": "train+valid"}, planned)) == {"MostPop"}
    # Of several splits, the runs on the one that the experiment itself is measured on.
    values = {"mean": 0.5, "values": [0.3, 0.4, 0.6, 0.7]}
    repeated = {"model": "bm3", "runs": list("abcd"), "splits": [42, 42, 43, 43], "metrics": {"recall@20": values}}
    write_json(
        Path("results/more/comparison.json"), {"settings": {"mask": "train"}, "experiments": {"repeated": repeated}}
    )
    (_, shown) = rivals(metrics, data, ["recall@20", "ndcg@20"], {"more": {"repeated": ["a", "b"]}})
    assert shown["values"] == {"recall@20": pytest.approx(0.35), "ndcg@20": None}
    assert names(metrics, {"more": {"repeated": ["a"]}}) == ["MostPop"]
    own = {"config": metrics["config"] | {"model": {"name": "mostpop"}}}
    assert names(metrics | own, {}) == []


def test_fused_points_that_hardly_differ_are_a_warning(made):
    metrics = read_json(made[0]["metrics"])
    near = metrics | {"training": metrics["training"] | {"best_loss": {"fused_cosine": 0.9951}}}
    (text,) = warnings_of(near)
    assert "mean cosine of 0.9951" in text and "model.detach_similarity" in text
    near["training"]["best_loss"]["fused_cosine"] = 0.95
    assert warnings_of(near) == []
    assert warnings_of(near | {"warning": "features are mixed"}) == ["features are mixed."]


def panels(page, which):
    """The HTML of each panel of a chooser."""
    start = page.source.index(f'data-panel="{which}"')
    end = page.source.index("</section>", start)
    return page.source[start:end].split(f'data-panel="{which}"')[1:]


def strips(html):
    """Each strip of images in a part of the page: its label, and (title, line under it) of each card."""
    found = {}
    for label, body in re.findall(
        r'<ul class="strip(?: wrapped)?" tabindex="0" aria-label="([^"]*)">(.*?)</ul>', html, re.DOTALL
    ):
        cards = re.findall(r'<li class="card( hit)?">.*?<bdi>(.*?)</bdi>(.*?)</li>', body, re.DOTALL)
        found[label] = [(title, re.sub("<[^>]*>", "", under).split(), bool(hit)) for hit, title, under in cards]
    return found


def test_neighbours_are_those_of_the_graphs_and_of_the_embeddings(made):
    inputs, _, _, page = made
    items = pq.read_table(inputs["items"])
    titles = items.column("title").to_pylist()
    vectors, _ = read_embeddings(inputs["item_embeddings"], "item_id", items.column("item_id").to_pylist())
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    graph = read_table(inputs["similarity.text"], SIMILARITY).to_pylist()
    checked = 0
    for html in panels(page, "neighbours"):
        title = re.search(r"<strong><bdi>(Thing \d+)</bdi>", html)
        if title is None:  # one of the hostile ones
            continue
        item = titles.index(title[1])
        shown = strips(html)
        near = [row["neighbour"] for row in graph if row["item"] == item and row["neighbour"] != item]
        assert shown["Neighbours by text"] and len(shown["Neighbours by text"]) == len(near)
        cosines = sorted((unit[item] @ unit[other] for other in range(len(titles)) if other != item), reverse=True)
        got = [title for title, _, _ in shown["Neighbours by fused"]]
        assert len(got) == 6
        for place, title in enumerate(got):
            if title.startswith("Thing"):
                assert unit[item] @ unit[titles.index(title)] == pytest.approx(cosines[place], abs=1e-5)
        checked += 1
    assert checked >= 6


def test_hits_are_the_held_out_items_among_the_first_recommendations(made):
    inputs, _, _, page = made
    rows = pq.read_table(inputs["interactions"]).to_pylist()
    items = pq.read_table(inputs["items"]).to_pylist()
    name = {row["item"]: (row["title"] or row["item_id"]) for row in items}
    users = pq.read_table(inputs["users"]).column("user_id").to_pylist()
    lists = pq.read_table(inputs["recommendations"]).to_pylist()
    options = re.findall(r"<option>(\d+) bought, (a|no) hit: (user\d+)</option>", page.source)
    assert {kind for _, kind, _ in options} == {"a", "no"} and len(options) == 8
    for (bought, kind, user_id), html in zip(options, panels(page, "users"), strict=True):
        user = users.index(user_id)
        held_out = {row["item"] for row in rows if row["user"] == user and row["split"] == "test"}
        ranked = [row["item_id"] for row in sorted(lists, key=lambda row: row["rank"]) if row["user_id"] == user_id][
            :10
        ]
        expected = [f"item{item}" in ranked for item in held_out]
        shown = strips(html)
        hits = [hit for _, _, hit in shown["Recommendations"]]
        assert hits == [int(item_id.removeprefix("item")) in held_out for item_id in ranked]
        assert (kind == "a") == any(expected) == any(hits)
        latest = sorted((r for r in rows if r["user"] == user and r["split"] == "train"), key=lambda r: -r["timestamp"])
        plain = [title for title, _, _ in shown["Training history"] if title.startswith("Thing")]
        assert plain == [name[r["item"]] for r in latest[:10] if name[r["item"]].startswith("Thing")]
        assert int(bought) == len({row["item"] for row in latest})


def test_texts_of_items_are_text_everywhere(made):
    page = made[3]
    assert page_shop.SCRIPT in page.text and page_shop.ISLAND in page.text and "{{ 7 * 7 }}" in page.text
    assert len(page.scripts) == 1 and "window.broken" not in page.scripts[0]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert all(uri.startswith("data:image/webp;base64,") for uri in images_of(page).values())


def test_nothing_in_the_page_points_outside_it(made):
    for tag, attributes in made[3].elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), f"<{tag} {name}={target}>"
        assert "style" not in attributes, "the policy refuses styles in attributes"
    policy = next(a["content"] for _, a in made[3].elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def images_of(page):
    """The data URI of each image of the page, by the item's number."""
    found = [attributes for tag, attributes in page.elements if tag == "image" and "id" in attributes]
    assert len({one["id"] for one in found}) == len(found)
    return {one["id"].removeprefix("image-"): one["href"] for one in found}


def test_every_chosen_image_is_in_the_page_once(made):
    _, _, facts, page = made
    images = images_of(page)
    wanted = {attributes["href"].removeprefix("#image-") for tag, attributes in page.elements if tag == "use"}
    assert wanted >= set(images) and facts["images"] == len(images) and facts["images_left_out"] == 0
    assert not {"5", "6", "7"} & set(images), "missing and damaged images have none"


def test_what_failed_is_counted_with_its_reasons(made):
    page = made[3]
    text = " ".join(page.text.split())
    assert "Images: 3 of 30" in text and "Captions (caption): 1 of 30" in text and "Vectors (image): 1 of 30" in text
    assert "Texts: 30 of 30" not in text, "items with a title have a text"
    assert ["missing", "1", "no input", "item5"] in [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert "Vectors (image): 1 of 30 These items are listed under Images above." in text, "failures are listed once"
    assert any("the server says no" in " ".join(row) for row in page.rows)
    assert ["ok", "1", "cut at the limit of 64 tokens", "item3"] in [
        [" ".join(c.split()) for c in r] for r in page.rows
    ]


def test_the_same_files_make_the_same_page_and_figures(made, tmp_path):
    inputs, folder, _, _ = made
    experiment_page(inputs=inputs, page_output=tmp_path / "report.html", figures_output=tmp_path / "figures", **MARKED)
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert {"stream-weights.svg", "alignment-uniformity.png", "training-loss.svg"} <= set(names)
    for name in names:
        assert (tmp_path / "figures" / name).read_bytes() == (folder / "figures" / name).read_bytes(), name


def test_a_model_with_numbers_alone_still_has_a_page(tmp_path):
    inputs = page_shop.bare_experiment(tmp_path)
    facts = experiment_page(inputs=inputs, page_output=tmp_path / "report.html", figures_output=tmp_path / "figures")
    page = Page(tmp_path / "report.html")
    assert facts["images"] == 0 and "interactions only" in page.text
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", page.source)
    assert headings == [
        "Settings",
        "Data and coverage",
        "Metrics",
        "Recommendations",
        "Failures",
    ]
    linked = {a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")}
    assert linked <= {f"#{a['id']}" for _, a in page.elements if "id" in a}


def test_images_beyond_the_budget_are_left_out_and_said_so(made, tmp_path):
    inputs = made[0]
    facts = experiment_page(
        inputs=inputs, page_output=tmp_path / "report.html", figures_output=tmp_path / "figures", budget=9000
    )
    page = Page(tmp_path / "report.html")
    assert facts["images_left_out"] > 0 and facts["images"] > 0
    assert sum(map(len, images_of(page).values())) <= 9000
    assert f"{facts['images_left_out']} images are left out" in page.text
