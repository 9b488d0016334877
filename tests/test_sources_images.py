"""Pictures: good ones are stored byte for byte, every bad kind is reported, none is dropped."""

import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import items_file, picture, respond, serving

from sources.images import collect_pictures
from sources.picture import UnreadableError, examine
from sources.pictures_config import Images, PictureLimits
from stages.errors import UserError
from stages.pictures import iter_pictures
from stages.tables import MANIFEST, read_table

LIMITS = PictureLimits().identity()


def collect(tmp_path: Path, references: dict[str, Any], spec: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    items = items_file(tmp_path / "items.parquet", references)
    manifest = tmp_path / "out" / "manifest.parquet"
    runtime = options.pop("runtime", {})
    options.setdefault("inputs", {})
    collect_pictures(spec, runtime, items, manifest=manifest, **options)
    return read_table(manifest, MANIFEST).to_pylist()


def local(folder: Path, **more: Any) -> dict[str, Any]:
    return Images(folder=str(folder), **more).spec()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels and that holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"this is a text file\n", "not a picture; it starts with b'this is a text"),
    "page": (b"<html><body>404</body></html>", "not a picture"),
    "truncated": (picture(colour="noise", size=(200, 200))[:2000], "corrupt: .*truncated"),
    "corrupt": (picture()[:30] + bytes(range(256)) * 4, "(corrupt|not a picture)"),
    "bomb": (png_of(20_000, 20_000), "(20000 x 20000 pixels are more than|too many pixels)"),
    "wide": (png_of(70_000, 1_000), "70000 x 1000 pixels are more than the 64000000 allowed"),
    "hollow": (png_of(500, 500), "corrupt"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "gzip": (gzip.compress(picture()), "not a picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_bytes_are_refused_with_the_reason(kind: str):
    data, complaint = BAD[kind]
    with pytest.raises(UnreadableError, match=complaint):
        examine(data, 64_000_000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_examine_tells_what_a_picture_is(format: str):
    data = picture((37, 21), format=format)
    found = examine(data, 64_000_000)
    assert (found.width, found.height, found.format) == (37, 21, format)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_every_item_has_its_row_in_item_order(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = {"a": picture(), "c": picture(colour="blue", format="PNG"), "e": picture()}
    for name, data in {**good, **{kind: data for kind, (data, _) in BAD.items()}}.items():
        (folder / f"{name}.jpg").write_bytes(data)
    ids = ["a", "b", *BAD, "c", "d", "e"]
    rows = collect(tmp_path, {name: [] for name in ids}, local(folder, pattern="{item_id}.jpg"))
    assert [row["item_id"] for row in rows] == ids
    status = {row["item_id"]: row["status"] for row in rows}
    assert status == {**dict.fromkeys(good, "ok"), **dict.fromkeys(BAD, "failed"), "b": "missing", "d": "missing"}
    assert all(bool(row["error"]) != (row["status"] == "ok") for row in rows)
    by_id = {row["item_id"]: row for row in rows}
    assert by_id["b"]["url"] == str(folder / "b.jpg") and by_id["b"]["error"] == "no such file"
    assert (by_id["c"]["width"], by_id["c"]["height"], by_id["c"]["format"]) == (40, 30, "PNG")
    # Equal pictures are stored once, and come back byte for byte.
    assert (by_id["a"]["shard"], by_id["a"]["row"]) == (by_id["e"]["shard"], by_id["e"]["row"])
    assert {ids[item]: data for item, data in iter_pictures(tmp_path / "out" / "manifest.parquet")} == good


def test_shards_depend_on_bytes_alone_and_stale_ones_go(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = {f"p{n:03d}": picture((20 + n, 20), colour="noise") for n in range(150)}
    for name, data in pictures.items():
        (folder / f"{name}.jpg").write_bytes(data)
    spec = local(folder, pattern="{item_id}.jpg")
    references: dict[str, Any] = {name: [] for name in pictures}
    collect(tmp_path, references, spec, shard_bytes=15_000, runtime={"threads": 1})
    shards = sorted((tmp_path / "out").glob("shard-*.parquet"))
    first = [shard.read_bytes() for shard in shards]
    assert len(shards) > 3
    rows = collect(tmp_path, references, spec, shard_bytes=15_000, runtime={"threads": 4})
    assert [shard.read_bytes() for shard in shards] == first
    for number in range(len(shards)):
        assert sum(len(pictures[row["item_id"]]) for row in rows if row["shard"] == number) <= 15_000
    assert dict(iter_pictures(tmp_path / "out" / "manifest.parquet")) == dict(enumerate(pictures.values()))
    collect(tmp_path, references, spec)
    assert [path.name for path in sorted((tmp_path / "out").glob("shard-*"))] == ["shard-00000.parquet"]
    assert dict(iter_pictures(tmp_path / "out" / "manifest.parquet")) == dict(enumerate(pictures.values()))


def test_the_items_own_column_names_the_file(tmp_path: Path):
    (tmp_path / "shop" / "sub").mkdir(parents=True)
    (tmp_path / "shop" / "sub" / "x.jpg").write_bytes(picture())
    references = {"a": ["sub/x.jpg"], "b": [], "c": ["http://example.com/x.jpg"], "d": ["none.jpg", "sub/x.jpg"]}
    rows = collect(tmp_path, references, local(tmp_path / "shop"))
    assert [row["status"] for row in rows] == ["ok", "missing", "failed", "ok"]
    assert "nothing is fetched" in rows[2]["error"]


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    shop = tmp_path / "shop"
    shop.mkdir()
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture())
    (shop / "link.jpg").symlink_to(secret)
    (shop / "inner.jpg").symlink_to(shop / "real.jpg")
    (shop / "real.jpg").write_bytes(picture())
    os.mkfifo(shop / "pipe.jpg")
    (shop / "folder.jpg").mkdir()
    references = {
        "up": ["../secret.jpg"], "round": ["x/../../secret.jpg"], "root": [str(secret)], "link": ["link.jpg"],
        "pipe": ["pipe.jpg"], "folder": ["folder.jpg"], "nul": ["a\0b"], "long": ["x" * 5000], "inner": ["inner.jpg"],
    }  # fmt: skip
    rows = {row["item_id"]: row for row in collect(tmp_path, references, local(shop))}
    assert {name for name, row in rows.items() if row["status"] != "failed"} == {"inner"}
    assert all("refused" in rows[name]["error"] for name in ("up", "round", "root", "link"))
    by_pattern = collect(tmp_path, {"../secret": [], str(secret)[:-4]: []}, local(shop, pattern="{item_id}.jpg"))
    assert [row["status"] for row in by_pattern] == ["failed", "failed"]


def test_patterns_are_tried_in_order(tmp_path: Path):
    (tmp_path / "012").mkdir()
    (tmp_path / "012" / "01234.jpg").write_bytes(picture())
    (tmp_path / "56789.png").write_bytes(picture(format="PNG"))
    spec = local(tmp_path, pattern=["{item_id:.3}/{item_id}.jpg", "{item_id}.png"])
    rows = collect(tmp_path, {"01234": [], "56789": [], "99999": []}, spec)
    assert [row["status"] for row in rows] == ["ok", "ok", "missing"]
    assert rows[2]["url"].endswith("999/99999.jpg")


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; set .*images\.folder"):
        collect(tmp_path, {"a": []}, local(tmp_path / "nowhere", pattern="{item_id}.jpg"))


def test_without_an_images_section_all_are_missing(tmp_path: Path):
    rows = collect(tmp_path, {"a": ["http://example.com/a.jpg"], "b": []}, {"find": "none"})
    assert [row["status"] for row in rows] == ["missing", "missing"]


def test_a_file_above_the_byte_cap_fails(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(picture(colour="noise", size=(300, 300)))
    rows = collect(tmp_path, {"a": []}, local(tmp_path, pattern="{item_id}.jpg", max_bytes=1000))
    assert rows[0]["status"] == "failed" and "1000 bytes" in rows[0]["error"]


def web(**more: Any) -> dict[str, Any]:
    return Images(**{"hosts": ["127.0.0.1"], "private": True, **more}).spec()


FAST = {"attempts": 3, "pause": 0.01, "rate": 1000.0, "timeout": 5.0}


def test_pictures_come_from_urls_with_candidates_in_order(tmp_path: Path):
    good, busy = picture(), []

    def sometimes(handler: Any) -> None:
        busy.append(1)
        respond(b"", 429, Retry_After="0")(handler) if len(busy) < 3 else respond(good)(handler)

    with serving() as server:
        server.answers = {
            "/good.jpg": respond(good),
            "/busy.jpg": sometimes,
            "/page": respond(b"<html>", kind="text/html"),
            "/moved": respond(b"", 302, Location="/good.jpg"),
            "/away": respond(b"", 302, Location="http://elsewhere.example.com/x.jpg"),
            "/loop": respond(b"", 302, Location="/loop"),
            "/large": respond(b"x" * 200_000),
        }
        paths = {
            "a": ["/good.jpg"], "b": ["/none.jpg", "/page", "/busy.jpg"], "c": ["/moved"], "d": ["/away"], "e": ["/loop"],
            "f": ["/large"], "g": [], "h": ["/none.jpg", "/page"],
        }  # fmt: skip
        references = {name: [server.url(path) for path in several] for name, several in paths.items()}
        rows = collect(tmp_path, references, web(max_bytes=100_000), runtime=FAST)
    got = {row["item_id"]: (row["status"], row["error"] or "") for row in rows}
    assert [got[name][0] for name in "abcdefgh"] == [
        "ok",
        "ok",
        "ok",
        "failed",
        "failed",
        "failed",
        "missing",
        "failed",
    ]
    assert "elsewhere.example.com is not in images.hosts" in got["d"][1]
    assert "redirects" in got["e"][1] and "100000 bytes" in got["f"][1]
    assert "HTTP 404" in got["h"][1] and "not a picture" in got["h"][1]
    assert rows[1]["url"] == references["b"][2]
    assert not (tmp_path / "out" / ".downloads").exists()


@pytest.mark.parametrize(
    ("url", "settings", "complaint"),
    [
        ("http://127.0.0.1:9/x.jpg", {"private": False}, "private address"),
        ("http://localhost:9/x.jpg", {"private": False, "hosts": ["localhost"]}, "private address"),
        ("http://evil.example.com/x.jpg", {}, "not in images.hosts"),
        ("http://127.0.0.1.example.com/x.jpg", {}, "not in images.hosts"),
        ("file:///etc/passwd", {}, "not http or https"),
        ("http://[bad/x.jpg", {}, "Invalid IPv6"),
    ],
)
def test_urls_that_lead_astray_are_not_asked(tmp_path: Path, url: str, settings: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=f"none of 1 pictures could be fetched.*{complaint}"):
        collect(tmp_path, {"a": [url]}, web(**settings), runtime=FAST)


def test_what_was_fetched_is_not_asked_again_after_a_stop(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a.jpg": respond(picture())}
        references = {"a": [server.url("/a.jpg")]}
        with pytest.raises(UserError, match=r"none of 1 pictures.*more than the 10 allowed"):
            collect(tmp_path, references, web(max_pixels=10), runtime=FAST)
        rows = collect(tmp_path, references, web(), runtime=FAST)
        assert server.asked == ["/a.jpg"]
    assert rows[0]["status"] == "ok"


def test_offline_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CM3_OFFLINE", "1")
    with serving() as server:
        with pytest.raises(
            UserError, match=r"CM3_OFFLINE is set, and the pictures of 1 items are not here.*images\.folder"
        ):
            collect(tmp_path, {"a": [server.url("/a.jpg")]}, web(), runtime=FAST)
        assert server.asked == []


def test_the_fashion_shops_photos(tmp_path: Path, hm: Path):
    names = [path.stem for path in sorted((hm / "images").iterdir())[:300]]
    rows = collect(tmp_path, {name: [f"images/{name}.jpg"] for name in names}, local(hm))
    assert {row["status"] for row in rows} == {"ok"}
    for item, data in iter_pictures(tmp_path / "out" / "manifest.parquet", [7, 299]):
        assert data == (hm / "images" / f"{names[item]}.jpg").read_bytes()
