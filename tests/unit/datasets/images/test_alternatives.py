"""Addresses of Amazon's images: the same path on other hosts, without a size code, and 400 or 403 as absence."""

from pathlib import Path
from typing import Any

import pytest
from oracles_sources import Server, cut_short, image, items_file, respond, serving

from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.alternatives import AMAZON_HOSTS, alternatives_of, with_alternatives
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images
from cm3.datasets.registry import parse_dataset

RUNTIME = {"attempts": 1, "pause": 0.01, "rate": 10_000.0, "timeout": 60.0, "threads": 2}
GOOD = image()
NA, MEDIA = "https://images-na.ssl-images-amazon.com", "https://m.media-amazon.com"
FAULTS: dict[str, Any] = {
    "bad request": respond(b"", 400),
    "forbidden": respond(b"", 403),
    "gone": respond(b"", 404),
    "down": respond(b"", 503),
    "cut": cut_short(GOOD),
    "page": respond(b"<html>no image", kind="text/html"),
    "truncated": respond(GOOD[:-40]),
    "placeholder": respond(b"", 302, Location="/img/no-img-sm.gif"),
}


def amazon_spec(server: Server, *roots: str) -> dict[str, Any]:
    """The spec of a shop like Amazon on a loopback server, where folders take the place of hosts."""
    spec = Images(hosts=["127.0.0.1"], private=True).spec()
    places = {"hosts": ["127.0.0.1"], "roots": [server.url(root) for root in roots], "absent": [400, 403]}
    return {**spec, "alternatives": places}


def collect(folder: Path, references: dict[str, list[str]], spec: dict[str, Any]) -> dict[str, Any]:
    items, manifest = items_file(folder / "items.parquet", references), folder / "out" / "manifest.parquet"
    collect_images(spec, RUNTIME, items, {}, manifest)
    return {row["item_id"]: row for row in read_table(manifest, MANIFEST).to_pylist()}


@pytest.mark.parametrize("third", ["good", "absent"])
def test_two_candidates_that_fail_in_each_way(tmp_path: Path, third: str):
    with serving() as server:
        for number, fault in enumerate(FAULTS.values()):
            path = f"/I/{number}.jpg"
            server.answers |= {path: fault, f"/na{path}": fault}
            server.answers[f"/media{path}"] = respond(GOOD) if third == "good" else respond(b"", 403)
        references = {name: [server.url(f"/I/{number}.jpg")] for number, name in enumerate(FAULTS)}
        rows = collect(tmp_path, references, amazon_spec(server, "/na", "/media"))
        assert sorted(server.asked) == sorted(server.answers)
        server.asked.clear()
        collect(tmp_path, references, amazon_spec(server, "/na", "/media"))
        again = list(server.asked)
    found = {name: row["status"] for name, row in rows.items()}
    if third == "good":
        assert found == dict.fromkeys(FAULTS, "ok") and not again
        assert {row["url"].partition("/I/")[0] for row in rows.values()} == {server.url("/media")}
    else:
        permanent = {"bad request", "forbidden", "gone", "placeholder"}
        assert found == {name: "missing" if name in permanent else "failed" for name in FAULTS}
        # What may pass is asked again, but not the hosts that said that there is no image.
        assert len(again) == 2 * (len(FAULTS) - len(permanent)) and not any("/media" in path for path in again)


def test_the_path_without_its_size_code_comes_last(tmp_path: Path):
    with serving() as server:
        server.answers = {"/na/I/5._V1_.jpg": respond(GOOD), "/I/6.jpg": respond(GOOD)}
        references = {"a": [server.url("/I/5._V1_.jpg")], "b": [server.url("/I/6._SX300_.jpg")]}
        rows = collect(tmp_path, references, amazon_spec(server, "/na"))
        asked = list(server.asked)
    assert [rows[name]["url"] for name in "ab"] == [server.url("/na/I/5._V1_.jpg"), server.url("/I/6.jpg")]
    assert [path for path in asked if "6" in path] == ["/I/6._SX300_.jpg", "/na/I/6._SX300_.jpg", "/I/6.jpg"]


def test_400_from_another_host_may_pass(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": respond(b"", 400), "/b": respond(b"", 403)}
        spec = Images(hosts=["127.0.0.1"], private=True).spec()
        rows = collect(tmp_path, {"a": [server.url("/a")], "b": [server.url("/b")]}, spec)
    assert "alternatives" not in spec and [rows[name]["status"] for name in "ab"] == ["failed", "failed"]


def test_addresses_of_2014_lead_to_the_hosts_of_today():
    spec = {"alternatives": alternatives_of(AMAZON_HOSTS)}
    first = "http://ecx.images-amazon.com/images/I/51a._SX300_.jpg"
    assert with_alternatives([first], spec) == [
        first,
        f"{NA}/images/I/51a._SX300_.jpg",
        f"{MEDIA}/images/I/51a._SX300_.jpg",
        "http://ecx.images-amazon.com/images/I/51a.jpg",
        f"{NA}/images/I/51a.jpg",
        f"{MEDIA}/images/I/51a.jpg",
    ]
    many = [f"{MEDIA}/images/I/{number}.jpg" for number in range(8)]
    assert with_alternatives(many, spec) == [*many, f"{NA}/images/I/0.jpg", f"{NA}/images/I/1.jpg"]
    elsewhere = ["http://example.org/a._SX300_.jpg", "no address", "http://user:pw@ecx.images-amazon.com/a.jpg"]
    assert with_alternatives(elsewhere, spec) == elsewhere


@pytest.mark.parametrize("source", ["amazon-2014", "amazon-2018", "amazon-2023"])
def test_each_generation_asks_all_hosts(source: str):
    spec = parse_dataset("baby", {"source": source, "category": "Baby"}, "datasets.baby").images_spec()
    assert spec["alternatives"]["roots"] == [NA, MEDIA] and spec["alternatives"]["absent"] == [400, 403]
    for name in ("z-ecx.images", "images-fe.ssl-images", "images-cn.ssl-images", "images-jp.ssl-images"):
        assert f"{name}-amazon.com" in spec["hosts"] and f"{name}-amazon.com" in spec["alternatives"]["hosts"]


def test_only_allowed_hosts_are_alternatives():
    images = Images(hosts=["ecx.images-amazon.com", "m.media-amazon.com", "example.org"])
    assert images.spec()["alternatives"] == {
        "hosts": ["ecx.images-amazon.com", "m.media-amazon.com"],
        "roots": [MEDIA],
        "absent": [400, 403],
    }
    assert Images(hosts=["*.ssl-images-amazon.com"]).spec()["alternatives"]["roots"] == [NA]
    assert "alternatives" not in Images(hosts=["example.org"]).spec()
