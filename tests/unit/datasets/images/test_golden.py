"""Golden output of the stage `images`: another status, reason or shard needs another version."""

import pyarrow.parquet as pq
from golden import check_golden
from oracles_sources import image, items_file

from cm3.common.stages import STAGES
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images


def test_images_give_their_golden_output(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    good = image((40, 30), format="PNG")
    contents = {
        "a.png": good,
        "b.png": good,
        "c.png": image((60, 50), "blue"),
        "d.png": good[:-40],
        "e.png": b"no image",
        "g.png": image((20, 20), format="GIF"),
        "h.png": image((33, 17), "green", "WEBP"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    items = items_file(tmp_path / "items.parquet", {name.partition(".")[0]: [] for name in [*contents, "missing.png"]})
    images = Images(folder=str(folder), pattern="{item_id}.png")
    manifest = tmp_path / "out/manifest.parquet"
    facts = collect_images(images.spec(), {"threads": 1}, items, {}, manifest)
    rows = pq.read_table(manifest).drop_columns(["sha256"]).to_pylist()
    shards = [len(pq.read_table(path)) for path in sorted(manifest.parent.glob("shard-*.parquet"))]
    for row in rows:
        for column in ("error", "url"):
            row[column] = row[column] and row[column].replace(f"{folder}/", "")
    facts = {name: value for name, value in facts.items() if name.startswith(("images_", "distinct", "image_bytes"))}
    outputs = {"rows": rows, "facts": facts, "shards": shards}
    check_golden("images", STAGES["images"].version, outputs)
