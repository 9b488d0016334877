"""Images: good ones are stored byte for byte, every bad kind is reported, none is dropped."""

import gzip
import hashlib
import io
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import image, items_file
from PIL import Image

from cm3.common.errors import UserError
from cm3.common.image_decode import UnreadableError
from cm3.common.images import iter_images
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images
from cm3.datasets.images.validate import PlaceholderError, examine


def collect(tmp_path: Path, references: dict[str, Any], spec: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    items = items_file(tmp_path / "items.parquet", references)
    manifest = tmp_path / "out" / "manifest.parquet"
    runtime = options.pop("runtime", {})
    options.setdefault("inputs", {})
    collect_images(spec, runtime, items, manifest=manifest, **options)
    return read_table(manifest, MANIFEST).to_pylist()


def local(folder: Path, **more: Any) -> dict[str, Any]:
    return Images(folder=str(folder), **more).spec()


def png_of(width: int, height: int, text: bytes = b"") -> bytes:
    """A PNG whose header promises width x height pixels and that holds next to nothing, or a compressed text."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" * 20_000))
        + chunk(b"IEND", b"")
    )


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"this is a text file\n", "not an image; it starts with b'this is a text"),
    "page": (b"<html><body>404</body></html>", "not an image"),
    "truncated": (image(colour="noise", size=(200, 200))[:2000], "corrupt: .*truncated"),
    "corrupt": (image()[:30] + bytes(range(256)) * 4, "(corrupt|not an image)"),
    "bomb": (png_of(20_000, 20_000), "(20000 x 20000 pixels are more than|too many pixels)"),
    "wide": (png_of(70_000, 1_000), "70000 x 1000 pixels are more than the 64000000 allowed"),
    "hollow": (png_of(500, 500), "corrupt"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "not an image"),
    "gzip": (gzip.compress(image()), "not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_bytes_are_refused_with_the_reason(kind: str):
    data, complaint = BAD[kind]
    with pytest.raises(UnreadableError, match=complaint):
        examine(data, 64_000_000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_examine_returns_the_facts_of_an_image(format: str):
    data = image((37, 21), format=format)
    found = examine(data, 64_000_000)
    assert (found.width, found.height, found.format) == (37, 21, format)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


NOISE = Image.effect_noise((90, 70), 50)
UNUSUAL = {
    "animated": saved(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90), NOISE.rotate(180)]),
    "cmyk": saved(NOISE.convert("CMYK"), "JPEG"),
    "progressive": saved(NOISE, "JPEG", progressive=True),
    "16 bits": saved(Image.new("I;16", (90, 70), 40_000), "PNG"),
    "palette": saved(NOISE.convert("P"), "PNG"),
    "webp": saved(NOISE.convert("RGB"), "WEBP"),
    "transparent": saved(NOISE.convert("RGBA"), "PNG"),
    "chatty": png_of(90, 70, bytes(50_000_000)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_are_images(kind: str):
    found = examine(UNUSUAL[kind], 64_000_000)
    assert (found.width, found.height) == (90, 70)


def decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
        return True
    except Exception:
        return False


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_fails_as_at_full_size(mode: str, options: dict[str, Any]):
    chance = random.Random(7)
    for size in ((8, 8), (37, 21), (200, 133)):
        data = saved(Image.effect_noise(size, 60).convert(mode), "JPEG", **options)
        tries = [
            data[:cut] for cut in [*range(len(data) - 20, len(data)), *(chance.randrange(len(data)) for _ in range(20))]
        ]
        for _ in range(20):
            damaged = bytearray(data)
            for _ in range(chance.randrange(1, 20)):
                damaged[chance.randrange(2, len(data))] = chance.randrange(256)
            tries.append(bytes(damaged))
        for tried in tries:
            try:
                judged = bool(examine(tried, 64_000_000))
            except UnreadableError:
                judged = False
            assert judged == (decodes(tried) and tried[:2] == b"\xff\xd8"), len(tried)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 500), (500, 2)])
def test_dots_are_placeholders(size: tuple[int, int]):
    with pytest.raises(PlaceholderError, match=f"a placeholder of {size[0]} x {size[1]} pixels"):
        examine(image(size, format="PNG"), 64_000_000)


def test_placeholders_are_missing(tmp_path: Path):
    blank, good = image(colour="white"), image()
    for name, data in {"a": blank, "b": good, "c": image((1, 1), format="GIF")}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    digest = hashlib.sha256(blank).hexdigest()
    spec = local(tmp_path, pattern="{item_id}.jpg", placeholders=[digest])
    rows = collect(tmp_path, {"a": [], "b": [], "c": []}, spec)
    assert [row["status"] for row in rows] == ["missing", "ok", "missing"]
    assert digest[:12] in rows[0]["error"] and "1 x 1" in rows[2]["error"]


@pytest.mark.parametrize("digest", ["", "abc", "A" * 64, "g" * 64, "0" * 64 + "\n", 7])
def test_placeholders_are_sha256_digests(digest: Any):
    with pytest.raises(ValueError, match="placeholders"):
        Images(hosts=["a.org"], placeholders=[digest])
    assert Images(hosts=["a.org"], placeholders=["b" * 64, "a" * 64, "a" * 64]).spec()["placeholders"] == [
        "a" * 64,
        "b" * 64,
    ]


def test_bombs_warn_as_errors_in_all_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    def complaint(_: int) -> str:
        with pytest.raises(UnreadableError) as error:
            examine(image(), 64_000_000)
        return str(error.value)

    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        complaints = list(pool.map(complaint, range(400)))
    assert all(text.startswith("too many pixels (") for text in complaints) and warnings.filters == filters


def test_every_item_has_its_row_in_item_order(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    good = {"a": image(), "c": image(colour="blue", format="PNG"), "e": image()}
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
    # Equal images are stored once, and come back byte for byte.
    assert (by_id["a"]["shard"], by_id["a"]["row"]) == (by_id["e"]["shard"], by_id["e"]["row"])
    assert {ids[item]: data for item, data in iter_images(tmp_path / "out" / "manifest.parquet")} == good


def test_shards_are_deterministic_and_stale_ones_deleted(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    images = {f"p{n:03d}": image((20 + n, 20), colour="noise") for n in range(150)}
    for name, data in images.items():
        (folder / f"{name}.jpg").write_bytes(data)
    spec = local(folder, pattern="{item_id}.jpg")
    references: dict[str, Any] = {name: [] for name in images}
    collect(tmp_path, references, spec, shard_bytes=15_000, runtime={"threads": 1})
    shards = sorted((tmp_path / "out").glob("shard-*.parquet"))
    first = [shard.read_bytes() for shard in shards]
    assert len(shards) > 3
    rows = collect(tmp_path, references, spec, shard_bytes=15_000, runtime={"threads": 4})
    assert [shard.read_bytes() for shard in shards] == first
    for number in range(len(shards)):
        assert sum(len(images[row["item_id"]]) for row in rows if row["shard"] == number) <= 15_000
    assert dict(iter_images(tmp_path / "out" / "manifest.parquet")) == dict(enumerate(images.values()))
    some = [row["item_id"] for row in rows if row["shard"] == 0]
    collect(tmp_path, {name: [] for name in some}, spec)
    assert list((tmp_path / "out").glob("shard-*")) == shards[:1] and shards[0].read_bytes() == first[0]
    assert dict(iter_images(tmp_path / "out" / "manifest.parquet")) == dict(enumerate(images[name] for name in some))


def test_a_missing_shard_is_explained_and_made_again(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(image((20, 20)))
    spec, manifest = local(folder, pattern="{item_id}.jpg"), tmp_path / "out" / "manifest.parquet"
    collect(tmp_path, {"a": []}, spec)
    (tmp_path / "out" / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.parquet: damaged \(it is missing\)"):
        dict(iter_images(manifest))
    manifest.unlink()
    collect(tmp_path, {"a": []}, spec)
    assert dict(iter_images(manifest)) == {0: (folder / "a.jpg").read_bytes()}


def test_the_image_column_names_the_file(tmp_path: Path):
    (tmp_path / "shop" / "sub").mkdir(parents=True)
    (tmp_path / "shop" / "sub" / "x.jpg").write_bytes(image())
    references = {"a": ["sub/x.jpg"], "b": [], "c": ["http://example.com/x.jpg"], "d": ["none.jpg", "sub/x.jpg"]}
    rows = collect(tmp_path, references, local(tmp_path / "shop"))
    assert [row["status"] for row in rows] == ["ok", "missing", "failed", "ok"]
    assert "nothing is fetched" in rows[2]["error"]


def test_links_into_a_store_are_followed_where_that_is_set(tmp_path: Path):
    store, shop = tmp_path / "store", tmp_path / "shop"
    store.mkdir()
    shop.mkdir()
    (store / "1f").write_bytes(image())
    (shop / "a.jpg").symlink_to(store / "1f")
    references = {"a": ["a.jpg"], "up": ["../store/1f"]}
    (row, _) = collect(tmp_path, references, local(shop))
    assert row["status"] == "failed" and "set images.follow_links: true" in row["error"]
    assert [row["status"] for row in collect(tmp_path, references, local(shop, follow_links=True))] == ["ok", "failed"]


def test_nothing_outside_the_folder_is_read(tmp_path: Path):
    shop = tmp_path / "shop"
    shop.mkdir()
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image())
    (shop / "link.jpg").symlink_to(secret)
    (shop / "inner.jpg").symlink_to(shop / "real.jpg")
    (shop / "real.jpg").write_bytes(image())
    os.mkfifo(shop / "pipe.jpg")
    (shop / "folder.jpg").mkdir()
    references = {
        "up": ["../secret.jpg"],
        "round": ["x/../../secret.jpg"],
        "root": [str(secret)],
        "link": ["link.jpg"],
        "pipe": ["pipe.jpg"],
        "folder": ["folder.jpg"],
        "nul": ["a\0b"],
        "long": ["x" * 5000],
        "inner": ["inner.jpg"],
    }
    rows = {row["item_id"]: row for row in collect(tmp_path, references, local(shop))}
    assert {name for name, row in rows.items() if row["status"] != "failed"} == {"inner"}
    assert all("refused" in rows[name]["error"] for name in ("up", "round", "root", "link"))
    by_pattern = collect(tmp_path, {"../secret": [], str(secret)[:-4]: []}, local(shop, pattern="{item_id}.jpg"))
    assert [row["status"] for row in by_pattern] == ["failed", "failed"]


def test_patterns_are_tried_in_order(tmp_path: Path):
    (tmp_path / "012").mkdir()
    (tmp_path / "012" / "01234.jpg").write_bytes(image())
    (tmp_path / "56789.png").write_bytes(image(format="PNG"))
    spec = local(tmp_path, pattern=["{item_id:.3}/{item_id}.jpg", "{item_id}.png"])
    rows = collect(tmp_path, {"01234": [], "56789": [], "99999": []}, spec)
    assert [row["status"] for row in rows] == ["ok", "ok", "missing"]
    assert rows[2]["url"].endswith("999/99999.jpg")


@pytest.mark.parametrize("name", ["{}.JPG", "photos/{}.jpg", "{}.png"])
def test_files_of_other_names_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    folder = tmp_path / "photos"
    for item in "ab":
        (folder / name.format(item)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.format(item)).write_bytes(image())
    references: dict[str, Any] = {"a": [], "b": []}
    assert {row["status"] for row in collect(tmp_path, references, local(folder, pattern="{item_id}.jpg"))} == {
        "missing"
    }
    shown = f"such as {folder}/a.jpg; the folder has {name.format('a')}, {name.format('b')}: correct images.pattern"
    assert f"2 of 2 items have no file, {shown}" in caplog.text
    caplog.clear()
    collect(tmp_path, references, local(folder, pattern=name.replace("{}", "{item_id}")))
    assert "have no file" not in caplog.text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s1--0.jpg\n", "git annex get"),
    ],
)
def test_pointers_of_large_files_are_named(tmp_path: Path, text: str, advice: str):
    (tmp_path / "a.jpg").write_text(text)
    [row] = collect(tmp_path, {"a": []}, local(tmp_path, pattern="{item_id}.jpg"))
    assert row["status"] == "failed" and advice in row["error"]


def test_a_bad_image_leads_to_the_next(tmp_path: Path):
    (tmp_path / "good.jpg").write_bytes(image())
    (tmp_path / "text.jpg").write_bytes(b"this is a text file")
    (tmp_path / "dot.jpg").write_bytes(image((1, 1), format="PNG"))
    bad = ["http://h/a.jpg", "../a.jpg", "text.jpg", "dot.jpg", "good.jpg/x.jpg", "a\0b"]
    references = {f"{n}": [name, "good.jpg"] for n, name in enumerate(bad)}
    assert {row["status"] for row in collect(tmp_path, references, local(tmp_path))} == {"ok"}
    references = {
        "first": ["none.jpg", "dot.jpg", "text.jpg", "../a.jpg"],
        "dot": ["none.jpg", "dot.jpg"],
        "none": ["good.jpg/x.jpg", "none.jpg"],
    }
    rows = {row["item_id"]: row for row in collect(tmp_path, references, local(tmp_path))}
    assert [(row["status"], row["url"].rpartition("/")[2]) for row in rows.values()] == [
        ("failed", "text.jpg"),
        ("missing", "dot.jpg"),
        ("missing", "x.jpg"),
    ]
    assert rows["none"]["error"] == "no such file" and "1 x 1" in rows["dot"]["error"]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; set .*images\.folder"):
        collect(tmp_path, {"a": []}, local(tmp_path / "nowhere", pattern="{item_id}.jpg"))


def test_without_an_images_section_all_are_missing(tmp_path: Path):
    rows = collect(tmp_path, {"a": ["http://example.com/a.jpg"], "b": []}, {"find": "none"})
    assert [row["status"] for row in rows] == ["missing", "missing"]


def test_a_file_above_the_byte_cap_fails(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(image(colour="noise", size=(300, 300)))
    rows = collect(tmp_path, {"a": []}, local(tmp_path, pattern="{item_id}.jpg", max_bytes=1000))
    assert rows[0]["status"] == "failed" and "1000 bytes" in rows[0]["error"]


def test_images_of_the_fashion_shop(tmp_path: Path, hm: Path):
    names = [path.stem for path in sorted((hm / "images").iterdir())[:300]]
    rows = collect(tmp_path, {name: [f"images/{name}.jpg"] for name in names}, local(hm))
    assert {row["status"] for row in rows} == {"ok"}
    for item, data in iter_images(tmp_path / "out" / "manifest.parquet", [7, 299]):
        assert data == (hm / "images" / f"{names[item]}.jpg").read_bytes()
