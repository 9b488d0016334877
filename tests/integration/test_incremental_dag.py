"""A shop that grows by a tenth, through the whole DAG: what each stage's record says it did, and that it is right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
from caption_server import MODEL, serving
from checkout import Checkout
from fixtures_extractors import COLOURS
from PIL import Image

from cm3.common.features import read_features

METRICS = "results/mine/metrics.json"
NAMES = list(COLOURS)
OLD, NEW = 40, 4


def write_products(folder: Path, first: int, last: int) -> None:
    """Append products, each with a photo of its own, and two new customers for each."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    with (folder / "products.jsonl").open("a") as items, (folder / "purchases.csv").open("a") as purchases:
        if first == 0:
            purchases.write("customer,sku,day\n")
        for number in range(first, last):
            colour = NAMES[number % len(NAMES)]
            Image.new("RGB", (40 + number, 64), COLOURS[colour]).save(folder / f"photos/p{number}.png")
            title = f"{colour} shoe for women " + "word " * number
            items.write(json.dumps({"sku": f"p{number}", "name": title}) + "\n")
            for customer in (2 * number, 2 * number + 1):
                for day in range(5):
                    sku = (number + 4 * day * (1 + customer % 2)) % last
                    purchases.write(f"c{customer},p{sku},2024-01-{day + 1:02d}\n")


def config(bert: Path, url: str) -> dict[str, Any]:
    return {
        "datasets": {
            "mine": {
                "source": "files",
                "kcore": 1,
                "interactions": {
                    "path": "shop/purchases.csv",
                    "columns": {"user": "customer", "item": "sku", "timestamp": "day"},
                },
                "items": {"path": "shop/products.jsonl", "columns": {"item_id": "sku", "title": "name"}},
                "images": {"folder": "shop/photos", "pattern": "{item_id}.png"},
            }
        },
        "extractors": {
            "words": {"modality": "text", "backend": "transformers-text", "weights": str(bert), "device": "cpu"},
            "looks": {"modality": "image", "backend": "descriptor"},
            "teller": {
                "modality": "caption",
                "backend": "openai-caption",
                "url": url,
                "model": MODEL,
                "encoder": "words",
            },
        },
        "experiments": {
            "mine": {
                "dataset": "mine",
                "modalities": {"text": "words", "image": "looks", "caption": "teller"},
                "model": {"embedding_dim": 16, "knn_k": 4},
                "training": {"epochs": 2, "batch_size": 64},
                "evaluation": {"ks": [5]},
            }
        },
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.save_text("bert", tmp_path_factory.mktemp("bert"))


def records(checkout: Checkout, what: str) -> dict[str, dict[str, Any]]:
    """Return the records of a stage by the folder of its modality, or by the extractor's name."""
    found = {}
    for path in (checkout.folder / "processed/mine").glob(what):
        key = path.parent.name if "features" in what else path.name.partition("-")[0]
        found[key] = json.loads(path.read_text())
    return found


def work(checkout: Checkout) -> dict[str, tuple[int, int, int]]:
    """Return (kept, encoded, repeated) of each extraction and of captioning."""
    found = records(checkout, "features/*/*.stage.json") | records(checkout, "captions/*.stage.json")
    return {name: (one["kept"], one["encoded"], one["repeated"]) for name, one in found.items()}


def searched(checkout: Checkout) -> dict[str, int]:
    return {name: one["counts"]["searched"] for name, one in records(checkout, "similarity/*.stage.json").items()}


def test_a_tenth_more_products_cost_a_tenth_of_the_work(tmp_path: Path, bert: Path) -> None:
    with serving() as server:
        grown = Checkout(tmp_path / "grown", config(bert, server.url))
        write_products(grown.folder / "shop", 0, OLD)
        grown.run("--until", "similarity", "--", METRICS)
        colours = len(NAMES)
        # Captions of one colour are the same words, and are encoded once.
        assert work(grown) == {
            "text": (0, OLD, 0),
            "image": (0, OLD, 0),
            "teller": (0, OLD, 0),
            "caption": (0, colours, OLD - colours),
        }
        assert len(server.asked) == OLD and searched(grown) == {"words": OLD, "looks": OLD, "teller": OLD}
        before = {m: read_features(path) for m, path in feature_files(grown).items()}

        write_products(grown.folder / "shop", OLD, OLD + NEW)
        output = grown.run("--verbose", METRICS)
        assert work(grown) == {
            "text": (OLD, NEW, 0),
            "image": (OLD, NEW, 0),
            "teller": (OLD, NEW, 0),
            "caption": (OLD + NEW, 0, 0),
        }
        assert "looks: 44 items: 40 cached, 4 encoded" in output and "44 items: 40 kept, 4 searched" in output
        assert len(server.asked) == OLD + NEW and searched(grown)["looks"] == searched(grown)["words"] == NEW
        assert grown.planned(METRICS) == {}

        fresh = Checkout(tmp_path / "fresh", config(bert, server.url))
        write_products(fresh.folder / "shop", 0, OLD)
        write_products(fresh.folder / "shop", OLD, OLD + NEW)
        (graph,) = (grown.folder / "processed/mine/similarity").glob("looks-*.parquet")
        graph = graph.relative_to(grown.folder)
        fresh.run(*(str(path.relative_to(grown.folder)) for path in feature_files(grown).values()), str(graph))
        for modality, path in feature_files(grown).items():
            ours, theirs = read_features(path), read_features(feature_files(fresh)[modality])
            assert ours.item_ids == theirs.item_ids and len(ours.item_ids) == OLD + NEW
            np.testing.assert_allclose(ours.embedding, theirs.embedding, atol=1e-6)
            row = {one: ours.embedding[n] for n, one in enumerate(ours.item_ids)}
            for one, vector in zip(before[modality].item_ids, before[modality].embedding, strict=True):
                assert np.array_equal(row[one], vector)
        assert (grown.folder / graph).read_bytes() == (fresh.folder / graph).read_bytes()


def feature_files(checkout: Checkout) -> dict[str, Path]:
    files = (checkout.folder / "processed/mine/features").glob("*/*.parquet")
    return {path.parent.name: path for path in files}
