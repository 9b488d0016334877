"""Amazon data as published in 2014, from a loopback server through the whole DAG: files, images, published vectors."""

import gzip
import http.server
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkout import Checkout

from cm3.datasets.registry import parse_dataset
from cm3.datasets.sample.generate import make_sample

METRICS = "results/shop/metrics.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Serve a small shop in the published layout; yields the root URL and the list of paths asked for."""
    root = tmp_path_factory.mktemp("server")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, directory=str(root), **options)

        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) > 2000:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        url = f"http://127.0.0.1:{listening.server_port}"
        write_shop(root, url)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield url, asked
        listening.shutdown()


def write_shop(root: Path, url: str) -> None:
    files = root / "categoryFiles"
    files.mkdir()
    sample = parse_dataset("shop", {"source": "sample", "users": 120, "items": 60, "corrupt_pictures": 1}, "")
    reviews, meta = files / "reviews_Shop_5.json.gz", files / "meta_Shop.json.gz"
    make_sample(sample.generate_spec(), reviews, meta, root / "pictures.sha256", root / "truth.parquet")
    lines = gzip.decompress(meta.read_bytes()).decode().replace("http://images.example.com/", f"{url}/images/")
    meta.write_bytes(gzip.compress(lines.encode()))
    asins = sorted({json.loads(line)["asin"] for line in gzip.decompress(reviews.read_bytes()).splitlines()})
    rng = np.random.default_rng(0)
    (root / "image_features/categoryFiles").mkdir(parents=True)
    with (root / "image_features/categoryFiles/image_features_Shop.b").open("wb") as vectors:
        for asin in asins[1:]:
            vectors.write(asin.encode() + rng.normal(size=4096).astype("<f4").tobytes())


def config(url: str) -> dict:
    return {
        "datasets": {
            "shop": {
                "source": "amazon-2014",
                "category": "Shop",
                "interactions": "reviews",
                "kcore": 3,
                "mirrors": [url],
                "images": {"hosts": ["127.0.0.1"], "private": True, "rate": 500},
            }
        },
        "extractors": {
            "looks": {"modality": "image", "backend": "descriptor"},
            "cnn": {"modality": "image", "backend": "precomputed", "format": "amazon-b"},
        },
        "experiments": {
            "shop": {
                "dataset": "shop",
                "modalities": {"image": "looks"},
                "model": {"embedding_dim": 16, "knn_k": 5},
                "training": {"epochs": 2, "batch_size": 128},
                "evaluation": {"ks": [5]},
            },
            "paper": {
                "dataset": "shop",
                "modalities": {"image": "cnn"},
                "preset": "official",
                "model": {"embedding_dim": 16, "knn_k": 5},
                "training": {"epochs": 2, "batch_size": 128},
            },
        },
    }


def test_files_images_and_published_vectors_are_fetched_once(server, tmp_path: Path):
    url, asked = server
    checkout = Checkout(tmp_path / "checkout", config(url))
    planned = checkout.planned(METRICS)
    assert planned["download"] == 2
    assert planned["images"] == 1
    checkout.run(METRICS)
    metrics = json.loads((checkout.folder / METRICS).read_text())
    coverage = metrics["coverage"]["image"]
    assert coverage["ok"] > 40
    assert coverage["failed"] == 1
    assert sum(coverage.values()) == metrics["counts"]["items"]
    assert "warning" not in metrics
    assert metrics["raw"]["meta"]["url"] == f"{url}/categoryFiles/meta_Shop.json.gz"
    assert len(metrics["raw"]["reviews"]["sha256"]) == 64
    before = len(asked)

    output = checkout.run("results/paper/metrics.json")
    assert asked[before:] == ["/image_features/categoryFiles/image_features_Shop.b"]
    paper = json.loads((checkout.folder / "results/paper/metrics.json").read_text())
    assert next(iter(paper)) == "warning"
    assert "replication only" in output.split("CM3 on shop")[1]
    assert paper["coverage"]["image"]["missing"] <= 1
    assert paper["coverage"]["image"]["failed"] == 0

    # Another mirror of the same files is no reason to fetch them again.
    moved = config(url)
    moved["datasets"]["shop"]["mirrors"] = ["http://127.0.0.1:9/elsewhere", url]
    checkout.configure(moved)
    assert checkout.planned(METRICS, "results/paper/metrics.json") == {}


def test_offline_it_names_the_file_to_provide_and_its_place(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url, asked = server
    before = len(asked)
    monkeypatch.setenv("CM3_OFFLINE", "1")
    checkout = Checkout(tmp_path / "checkout", config(url))
    output = checkout.run(METRICS, check=False)
    assert "raw/shop/reviews_Shop_5.json.gz" in output
    assert "CM3_OFFLINE" in output
    assert "Traceback" not in output
    # Files that somebody puts there are taken, and never removed.
    with urllib.request.urlopen(f"{url}/categoryFiles/meta_Shop.json.gz") as file:
        meta = checkout.folder / "raw/shop/meta_Shop.json.gz"
        meta.parent.mkdir(parents=True, exist_ok=True)
        meta.write_bytes(file.read())
    with urllib.request.urlopen(f"{url}/categoryFiles/reviews_Shop_5.json.gz") as file:
        (meta.parent / "reviews_Shop_5.json.gz").write_bytes(file.read())
    checkout.run("processed/shop/stats.json")
    assert checkout.planned("processed/shop/stats.json") == {}
    assert (
        "raw/shop/reviews_Shop_5.json.gz: a file of your own" in (checkout.folder / "logs/shop/prepare.log").read_text()
    )
    assert len(asked) == before + 2
