"""The made-up shop: the same seed gives the same bytes, and its ground truth holds."""

import ast
import gzip
import hashlib
import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from oracles_sources import run_prepare
from PIL import Image
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, MANIFEST, read_table
from cm3.datasets.images.stage import collect_images
from cm3.datasets.k_core import kcore
from cm3.datasets.prepare import prepare
from cm3.datasets.registry import parse_dataset
from cm3.datasets.sample.config import SampleSpec
from cm3.datasets.sample.generate import TRUTH, make_sample
from cm3.datasets.sample.images import draw
from cm3.datasets.sample.texts import description
from cm3.datasets.sample.world import ATTRIBUTES, IMAGE_ATTRIBUTES, TEXT_ATTRIBUTES, World, make_world
from cm3.datasets.splits import split

SMALL = {"source": "sample", "users": 300, "items": 120, "corrupt_pictures": 4, "picture_size": 48}


def config(**settings: Any) -> SampleSpec:
    found = parse_dataset("sample", {"source": "sample", **settings}, "datasets.sample")
    assert isinstance(found, SampleSpec)
    return found


def write(folder: Path, **settings: Any) -> dict[str, Any]:
    names = {
        "reviews": "reviews.json.gz",
        "meta": "meta.json.gz",
        "images": "pictures.sha256",
        "truth": "truth.parquet",
    }
    return make_sample(config(**settings).generate_spec(), **{name: folder / file for name, file in names.items()})


def unpacked(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "sample"
    write(folder, **{k: v for k, v in SMALL.items() if k != "source"})
    return folder


def test_equal_seeds_give_equal_bytes_in_another_process(shop: Path, tmp_path: Path):
    outputs = [
        f"{n}={tmp_path / 'b' / f}"
        for n, f in (
            ("reviews", "reviews.json.gz"),
            ("meta", "meta.json.gz"),
            ("images", "pictures.sha256"),
            ("truth", "truth.parquet"),
        )
    ]
    settings = {k: v for k, v in SMALL.items() if k != "source"}
    command = [
        sys.executable,
        "-m",
        "cm3.datasets.sample.generate",
        "--spec",
        json.dumps(config(**settings).generate_spec()),
    ]
    for output in outputs:
        command += ["--output", output]
    subprocess.run(command, check=True, timeout=600, cwd=ROOT, capture_output=True)
    ours = contents(tmp_path / "b")
    assert {k: v for k, v in ours.items() if not k.endswith(".lock")} == contents(shop)
    write(tmp_path / "c", **{**settings, "seed": 2})
    other = contents(tmp_path / "c")
    assert all(other[name] != ours[name] for name in ("reviews.json.gz", "meta.json.gz", "pictures.sha256"))


def test_writing_again_leaves_no_images_of_the_shop_before(tmp_path: Path):
    write(tmp_path, users=40, items=30, picture_size=32)
    write(tmp_path, users=40, items=20, picture_size=32, without_picture=0.0, corrupt_pictures=0)
    assert len(list((tmp_path / "images").iterdir())) == 20


def test_the_files_have_the_published_formats(shop: Path):
    reviews = [json.loads(line) for line in unpacked(shop / "reviews.json.gz")]
    assert {"reviewerID", "asin", "overall", "unixReviewTime", "reviewText", "summary", "reviewTime"} <= set(reviews[0])
    assert {r["overall"] for r in reviews} == {1.0, 2.0, 3.0, 4.0, 5.0}
    items = [ast.literal_eval(line) for line in unpacked(shop / "meta.json.gz")]
    assert len(items) == 120 and all(re.fullmatch(r"B0[0-9A-Z]{8}", item["asin"]) for item in items)
    assert all(isinstance(path, list) for item in items for path in item["categories"])
    listing = dict(reversed(line.split()) for line in (shop / "pictures.sha256").read_text().splitlines())
    assert listing == {
        f"images/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in (shop / "images").iterdir()
    }


def test_what_is_missing_and_damaged_is_as_the_truth_says(shop: Path, tmp_path: Path):
    settings = config(**{k: v for k, v in SMALL.items() if k != "source"})
    truth = {row["item_id"]: row for row in read_table(shop / "truth.parquet", TRUTH).to_pylist()}
    counts = {state: sum(row["picture"] == state for row in truth.values()) for state in ("ok", "missing", "corrupt")}
    assert counts == {"ok": 112, "missing": 4, "corrupt": 4}
    assert sum(not row["has_description"] for row in truth.values()) == 12
    items = {row["asin"]: row for row in map(ast.literal_eval, unpacked(shop / "meta.json.gz"))}
    for item_id, row in truth.items():
        assert ("description" in items[item_id]) == row["has_description"]
        assert ("imUrl" in items[item_id]) == (row["picture"] != "missing")
    # The whole way to the manifest: each damage is found, nothing else is.
    inputs = {"reviews": shop / "reviews.json.gz", "meta": shop / "meta.json.gz"}
    tables = {name: tmp_path / f"{name}.parquet" for name in ("ratings", "items", "users")}
    prepare(
        {**settings.prepare_spec(), "kcore": 0, "cold_items": "keep"}, inputs, stats=tmp_path / "stats.json", **tables
    )
    manifest = tmp_path / "images" / "manifest.parquet"
    collect_images(settings.images_spec(), {}, tables["items"], {"images": shop / "pictures.sha256"}, manifest)
    status = {row["item_id"]: row["status"] for row in read_table(manifest, MANIFEST).to_pylist()}
    expected = {"ok": "ok", "missing": "missing", "corrupt": "failed"}
    assert status == {item_id: expected[row["picture"]] for item_id, row in truth.items()}
    texts = read_table(tables["items"], ITEMS).to_pylist()
    assert not any("&#39;" in row["description"] or "<b>" in row["description"] for row in texts)


def test_texts_never_tell_what_images_show(shop: Path):
    told = "\n".join(unpacked(shop / "meta.json.gz")).lower()
    for values in IMAGE_ATTRIBUTES.values():
        for value in values:
            assert not re.search(rf"\b{value}\b", told), value
    truth = read_table(shop / "truth.parquet", TRUTH).to_pylist()
    items = {row["asin"]: row for row in map(ast.literal_eval, unpacked(shop / "meta.json.gz"))}
    for row in truth:
        text = str(items[row["item_id"]]).lower()
        assert row["kind"] in text and row["material"] in text and row["use"] in text


def test_descriptions_read_like_a_shops():
    rng = np.random.default_rng(0)
    lengths = [
        len(description(rng, kind, material, use).split())
        for kind in TEXT_ATTRIBUTES["kind"]
        for material in TEXT_ATTRIBUTES["material"]
        for use in TEXT_ATTRIBUTES["use"]
    ]
    assert min(lengths) >= 15 and max(lengths) <= 75 and 30 < np.mean(lengths) < 60


@pytest.mark.parametrize("colour", IMAGE_ATTRIBUTES["colour"])
def test_images_show_their_colour(colour: str):
    def middle(name: str, pattern: str, seed: int) -> np.ndarray:
        data = draw(np.random.default_rng(seed), name, pattern, "square", 96)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)[30:66, 30:66].reshape(-1, 3)

    plain = {name: middle(name, "plain", 1).mean(axis=0) for name in IMAGE_ATTRIBUTES["colour"]}
    for pattern in IMAGE_ATTRIBUTES["pattern"]:
        pixels = middle(colour, pattern, 2)
        coloured = pixels[pixels.min(axis=1) < 190]  # The rest is the pattern's white.
        nearest = np.stack([np.abs(coloured - plain[name]).sum(axis=1) for name in plain]).argmin(axis=0)
        votes = np.bincount(nearest, minlength=len(plain))
        assert list(plain)[votes.argmax()] == colour, pattern
        spread = pixels.std(axis=0).max()
        assert spread < 6 if pattern == "plain" else spread > 20


def test_images_show_their_shape():
    rng = np.random.default_rng(0)
    masks = {}
    for shape in IMAGE_ATTRIBUTES["shape"]:
        data = draw(rng, "blue", "plain", shape, 64)
        masks[shape] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[..., 0] < 120
    areas = {shape: float(mask.mean()) for shape, mask in masks.items()}
    assert all(0.1 < area < 0.7 for area in areas.values()), areas
    names = list(masks)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both, either = (masks[one] & masks[other]).sum(), (masks[one] | masks[other]).sum()
            assert both / either < 0.93, (one, other)


def _recall(scores: np.ndarray, train: np.ndarray, test: np.ndarray, k: int = 20) -> float:
    masked = np.where(train > 0, -np.inf, scores)
    top = np.argpartition(-masked, k, axis=1)[:, :k]
    rows = test.sum(axis=1) > 0
    hits = np.take_along_axis(test, top, axis=1).sum(axis=1)
    return float((hits[rows] / test[rows].sum(axis=1)).mean())


def _recalls(world: World) -> dict[str, float]:
    """Recall@20 of popularity, item-kNN, and kNN over the true attributes of images, of texts, of both."""
    keep = kcore(world.user, world.item, 5)
    user = np.unique(world.user[keep], return_inverse=True)[1]
    ids, item = np.unique(world.item[keep], return_inverse=True)
    labels = split(user, 42)
    train, test = np.zeros((2, user.max() + 1, len(ids)), np.float32)
    train[user[labels == 0], item[labels == 0]] = 1
    test[user[labels == 2], item[labels == 2]] = 1
    popularity = train.sum(axis=0)
    unit = train / np.sqrt(np.maximum(popularity, 1))
    collaborative = unit.T @ unit
    np.fill_diagonal(collaborative, 0)
    found = {
        "popularity": _recall(np.tile(popularity, (len(train), 1)), train, test),
        "collaborative": _recall(train @ collaborative, train, test),
    }
    for name, attributes in (("images", IMAGE_ATTRIBUTES), ("texts", TEXT_ATTRIBUTES), ("both", ATTRIBUTES)):
        content = np.hstack([np.eye(len(v), dtype=np.float32)[world.attributes[a][ids]] for a, v in attributes.items()])
        content -= content.mean(axis=0)
        found[name] = _recall(train @ (content @ content.T), train, test)
    return found


def test_content_beats_everything_without_it_and_both_kinds_beat_one():
    recall = _recalls(make_world(config().generate_spec()))
    assert recall["both"] > 1.4 * recall["collaborative"] > 3 * recall["popularity"]
    assert recall["both"] > 1.5 * max(recall["images"], recall["texts"])
    assert min(recall["images"], recall["texts"]) > 3 * recall["popularity"]


def test_the_knobs_do_what_they_say():
    base = {"users": 1000, "items": 500}
    no_taste = _recalls(make_world(config(**base, taste=0.0).generate_spec()))
    assert max(no_taste["both"], no_taste["collaborative"]) < no_taste["popularity"]
    images_only = _recalls(make_world(config(**base, picture_share=1.0).generate_spec()))
    assert images_only["images"] > 3 * images_only["texts"]
    popular = make_world(config(**base, popularity=3.0).generate_spec())
    plain = make_world(config(**base, popularity=0.0).generate_spec())
    assert np.bincount(popular.item).max() > 2 * np.bincount(plain.item).max()


def test_the_default_shop_has_the_promised_size():
    world = make_world(config().generate_spec())
    keep = kcore(world.user, world.item, 5)
    users, items = len(np.unique(world.user[keep])), len(np.unique(world.item[keep]))
    assert users >= 2950 and 900 <= items <= 1000 and keep.sum() / users >= 10
    assert len(set(zip(world.user.tolist(), world.item.tolist(), strict=True))) == len(world.user)
    bought = np.bincount(world.item, minlength=1000)
    assert np.median(bought[world.cold]) <= 4 < np.median(bought[~world.cold])
    by_user = np.flatnonzero(np.diff(world.user) == 0)
    assert (world.time[by_user + 1] >= world.time[by_user]).all()


@pytest.mark.parametrize(("users", "items"), [(10, 10), (30, 12), (2000, 15)])
def test_any_size(users: int, items: int):
    world = make_world(config(users=users, items=items).generate_spec())
    assert set(world.user.tolist()) == set(range(users)) and world.item.max() < items
    assert len(set(zip(world.user.tolist(), world.item.tolist(), strict=True))) == len(world.user)


def test_the_shop_as_a_users_own_files_is_the_same_shop(shop: Path, tmp_path: Path):
    # The two readers agree on real content: the shop, rewritten as a table, gives the same statistics.
    rows = [json.loads(line) for line in unpacked(shop / "reviews.json.gz")]
    text = "user,item,rating,timestamp\n" + "".join(
        f"{r['reviewerID']},{r['asin']},{r['overall']},{r['unixReviewTime']}\n" for r in rows
    )
    (tmp_path / "interactions.csv").write_text(text)
    columns = {"rating": "rating", "timestamp": "timestamp"}
    stats = run_prepare(
        tmp_path,
        {"source": "files", "interactions": {"path": str(tmp_path / "interactions.csv"), "columns": columns}},
    )
    expected = kcore(*(np.unique([r[k] for r in rows], return_inverse=True)[1] for k in ("reviewerID", "asin")), 5)
    assert stats["interactions"] == expected.sum() == pq.read_metadata(tmp_path / "ratings.parquet").num_rows


DRAWN = {"users": 20, "items": 12, "picture_size": 32}


def test_files_of_a_user_among_the_drawn_ones_stay(tmp_path: Path):
    write(tmp_path, **DRAWN)
    drawn = contents(tmp_path)
    mine = {"notes.txt": b"1", "images/photo.jpg": b"2", "images/B0.jpg": b"3", "images/more/B000000000.jpg": b"4"}
    for name, content in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write(tmp_path, **DRAWN | {"seed": 2})
    assert mine.items() <= contents(tmp_path).items()
    # Nothing of the other shop is left.
    write(tmp_path, **DRAWN)
    assert contents(tmp_path) == drawn | mine


def test_a_full_disk_is_one_line_and_no_half_shop(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match="images: file too large"):
            write(tmp_path, **{k: v for k, v in SMALL.items() if k != "source"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
