"""Images inside a Parquet item table: bytes and Hugging Face's structs, in any order, with their faults."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracles_sources import image, run_prepare

from cm3.common.errors import UserError
from cm3.common.images import iter_images
from cm3.common.tables import ITEMS, MANIFEST, read_table
from cm3.datasets.images.stage import collect_images
from cm3.datasets.registry import parse_dataset

COLOURS = ("red", "green", "blue", "white", "black", "noise")
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def shop(folder: Path, images: pa.Array, items: str = "shop.parquet", **settings: Any) -> dict[str, Any]:
    """Write interactions of four users and an item table in reverse order; return the config of the data set."""
    ids = [f"i{number}" for number in range(len(images))]
    pairs = pa.table({"user": [f"u{n}" for n in range(4) for _ in ids], "item": ids * 4})
    pq.write_table(pairs, folder / "pairs.parquet")
    table = pa.table({"item_id": ids, "title": ids, "image": images}).take(list(reversed(range(len(ids)))))
    path = folder / items
    if path.suffix:
        pq.write_table(table, path, row_group_size=2)
    else:
        path.mkdir()
        for part in range(2):
            pq.write_table(table.slice(3 * part, 3), path / f"part-{part}.parquet")
    return {
        "source": "files",
        "kcore": 2,
        "interactions": {"path": str(folder / "pairs.parquet")},
        "items": {"path": str(path), "columns": {"title": "title", "image": "image"}},
        "images": {"embedded": True, **settings},
    }


def collect(folder: Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Prepare the data set and collect its images; return the rows of the manifest."""
    run_prepare(folder, data)
    spec = parse_dataset("mine", data, "datasets.mine")
    inputs = {name: Path(path) for name, path in spec.image_inputs("mine").items()}
    manifest = folder / "out" / "manifest.parquet"
    collect_images(spec.images_spec(), {"threads": 2}, folder / "items.parquet", inputs, manifest)
    rows: list[dict[str, Any]] = read_table(manifest, MANIFEST).to_pylist()
    return rows


def column(kind: str, images: list[bytes]) -> pa.Array:
    if kind == "bytes":
        return pa.array(images, pa.large_binary())
    structs = [{"bytes": data, "path": f"photo {number}.jpg"} for number, data in enumerate(images)]
    if kind == "struct":
        return pa.array(structs, HUGGING_FACE)
    broken = {"bytes": b"no image", "path": None}
    return pa.array([[broken, struct, broken] for struct in structs], pa.list_(HUGGING_FACE))


@pytest.mark.parametrize("items", ["shop.parquet", "shop"])
@pytest.mark.parametrize("kind", ["bytes", "struct", "list"])
def test_each_item_gets_its_own_image(tmp_path: Path, kind: str, items: str):
    images = [image(colour=colour) for colour in COLOURS]
    rows = collect(tmp_path, shop(tmp_path, column(kind, images), items))
    assert [(row["item_id"], row["status"]) for row in rows] == [(f"i{n}", "ok") for n in range(len(COLOURS))]
    if kind == "struct":
        assert rows[2]["url"].endswith(":photo 2.jpg")
    assert dict(iter_images(tmp_path / "out" / "manifest.parquet")) == dict(enumerate(images))
    assert read_table(tmp_path / "items.parquet", ITEMS).column("image_urls").to_pylist() == [[]] * len(COLOURS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.parquet", "shard-00000.parquet"]


def test_faults_have_their_status(tmp_path: Path):
    good = image()
    values = [
        {"bytes": good, "path": None},
        None,
        {"bytes": None, "path": "elsewhere.jpg"},
        {"bytes": good[:-40], "path": "cut.jpg"},
        {"bytes": image((1, 1), format="GIF"), "path": None},
        {"bytes": image((400, 400), "noise", "PNG"), "path": None},
    ]
    rows = collect(tmp_path, shop(tmp_path, pa.array(values, HUGGING_FACE), max_bytes=100_000))
    assert [row["status"] for row in rows] == ["ok", "missing", "missing", "failed", "missing", "failed"]
    assert rows[2]["error"] == "the item table holds no image" and "corrupt" in rows[3]["error"]
    assert "1 x 1" in rows[4]["error"] and "100000 bytes" in rows[5]["error"]


def test_what_is_no_image_column_is_named(tmp_path: Path):
    texts = shop(tmp_path, pa.array(["a.jpg", "b.jpg"]))
    with pytest.raises(UserError, match=r"column 'image' is of type string; images\.embedded needs bytes, or structs"):
        collect(tmp_path, texts)
    data = shop(tmp_path, column("struct", [image()] * 2))
    data["items"]["columns"]["image"] = "photo"
    with pytest.raises(UserError, match=r"shop\.parquet: has no column 'photo'"):
        collect(tmp_path, data)
    data = shop(tmp_path, column("struct", [image()] * 2))
    del data["images"]
    with pytest.raises(UserError, match=r"where text is expected.* set images: {embedded: true}"):
        run_prepare(tmp_path, data)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"images": {"embedded": True, "hosts": ["a.org"]}}, "embedded images need neither folder nor hosts"),
        ({"items": {"path": "shop.jsonl", "columns": {"image": "image"}}}, "needs a Parquet table of items"),
        ({"items": {"path": "shop.parquet"}}, r"needs a Parquet table of items, and its items\.columns\.image"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, Any], complaint: str):
    data = {
        "source": "files",
        "interactions": {"path": "pairs.csv"},
        "items": {"path": "shop.parquet", "columns": {"image": "image"}},
        "images": {"embedded": True},
    }
    with pytest.raises(UserError, match=complaint):
        parse_dataset("mine", data | changed, "datasets.mine")
