"""Stage: generate the sample dataset in the Amazon 2014 formats, byte-identical for the same seed."""

import gzip
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.files import atomic, writing
from cm3.common.progress import Progress
from cm3.common.tables import write_table
from cm3.datasets.sample import texts
from cm3.datasets.sample.images import draw, spoil
from cm3.datasets.sample.world import ATTRIBUTES, World, make_world

log = logging.getLogger("cm3.datasets.sample.generate")

TRUTH = pa.schema(
    [
        ("item_id", pa.string()),
        *((name, pa.string()) for name in ATTRIBUTES),
        ("popularity", pa.float32()),  # log-odds
        ("cold", pa.bool_()),
        ("picture", pa.string()),  # ok, missing or corrupt
        ("has_description", pa.bool_()),
    ]
)
_OWN_IMAGE = re.compile(r"B0[0-9A-Z]{8}\.jpg")
_LETTERS = np.asarray(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def make_sample(spec: dict[str, Any], reviews: Path, meta: Path, images: Path, truth: Path) -> dict[str, Any]:
    """Write reviews, metadata, images, their checksums, and the ground truth.

    Args:
        spec: a sample dataset's generate_spec().
        reviews: file to write, gzip JSON lines; meta: gzip Python literals; truth: table TRUTH.
        images: checksums in the format of sha256sum; the images are in the folder `images` next to this file.

    Returns:
        counts of users, items, reviews and images.
    """
    world = make_world(spec)
    # A random stream for each kind of file: other image settings must not change the texts.
    streams = np.random.SeedSequence((spec["seed"], 1)).spawn(4)
    for_ids, for_texts, for_images, for_reviews = map(np.random.default_rng, streams)
    asins = _ids(for_ids, spec["items"], "B0", 10)
    reviewers = _ids(for_ids, spec["users"], "A", 14)
    state = _draw_all(for_images, world, asins, spec, images)
    _write_lines(meta, _metadata(for_texts, world, asins))
    _write_lines(reviews, _reviews(for_reviews, world, asins, reviewers))
    columns = {name: [values[c] for c in world.attributes[name]] for name, values in ATTRIBUTES.items()}
    table = {
        "item_id": asins,
        **columns,
        "popularity": world.popularity,
        "cold": world.cold,
        "picture": state,
        "has_description": world.has_description,
    }
    write_table(truth, pa.table(table), TRUTH)
    facts = {
        "users": spec["users"],
        "items": spec["items"],
        "reviews": len(world.user),
        **{f"images_{name}": state.count(name) for name in ("ok", "missing", "corrupt")},
        "items_without_description": int((~world.has_description).sum()),
        "cold_items": int(world.cold.sum()),
    }
    log.info("%s", ", ".join(f"{name} {count}" for name, count in facts.items()))
    return facts


def _ids(rng: np.random.Generator, count: int, prefix: str, length: int) -> list[str]:
    """Return `count` distinct ids in random order."""
    ids: dict[str, None] = {}
    while len(ids) < count:
        drawn = _LETTERS[rng.integers(0, len(_LETTERS), (count - len(ids), length - len(prefix)))]
        ids.update(dict.fromkeys(prefix + "".join(row) for row in drawn))
    return list(ids)


def _draw_all(
    rng: np.random.Generator, world: World, asins: list[str], spec: dict[str, Any], images: Path
) -> list[str]:
    with_image = np.flatnonzero(world.has_image)
    chosen = rng.permutation(with_image)[: spec["corrupt_pictures"]].tolist()
    corrupt = {item: kind for kind, item in enumerate(chosen)}
    folder = images.parent / "images"
    drawing = images.parent / ".images.part"
    state, listing = [], []
    try:
        with writing(folder), Progress(len(asins), "images") as progress:
            shutil.rmtree(drawing, ignore_errors=True)
            drawing.mkdir(parents=True)
            for item, asin in enumerate(asins):
                progress.advance()
                shown = {
                    name: ATTRIBUTES[name][world.attributes[name][item]] for name in ("colour", "pattern", "shape")
                }
                data = draw(rng, **shown, size=spec["picture_size"])
                if not world.has_image[item]:
                    state.append("missing")
                    continue
                if item in corrupt:
                    data = spoil(data, corrupt[item])
                (drawing / f"{asin}.jpg").write_bytes(data)
                listing.append(f"{hashlib.sha256(data).hexdigest()}  images/{asin}.jpg\n")
                state.append("corrupt" if item in corrupt else "ok")
            _put_in_place(drawing, folder)
    finally:
        shutil.rmtree(drawing, ignore_errors=True)
    with atomic(images) as temporary:
        temporary.write_text("".join(sorted(listing, key=lambda line: line.split()[1])), encoding="utf-8")
    return state


def _put_in_place(drawing: Path, folder: Path) -> None:
    """Move the drawn images to their folder, in place of earlier ones; other files there are a user's and stay."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if _OWN_IMAGE.fullmatch(path.name) and path.is_file():
            path.unlink()
    for path in drawing.iterdir():
        shutil.move(path, folder / path.name)
    drawing.rmdir()


def _metadata(rng: np.random.Generator, world: World, asins: list[str]) -> Iterable[str]:
    kinds, materials, uses = (
        [ATTRIBUTES[name][c] for c in world.attributes[name]] for name in ("kind", "material", "use")
    )
    for item, asin in enumerate(asins):
        brand = texts.BRANDS[int(rng.integers(len(texts.BRANDS)))]
        record = {
            "asin": asin,
            "title": texts.title(rng, brand, kinds[item], materials[item], uses[item]),
            "brand": brand,
            "price": round(float(np.exp(rng.normal(3, 0.5))), 2),
            "categories": texts.categories(kinds[item], uses[item]),
        }
        description = texts.description(rng, kinds[item], materials[item], uses[item])
        if world.has_description[item]:
            record["description"] = description
        if world.has_image[item]:
            record["imUrl"] = f"http://images.example.com/{asin}.jpg"
        yield repr(record)


def _reviews(rng: np.random.Generator, world: World, asins: list[str], reviewers: list[str]) -> Iterable[str]:
    columns = (world.user.tolist(), world.item.tolist(), world.rating.tolist(), world.time.tolist())
    for user, item, rating, when in zip(*columns, strict=True):
        summary, text = texts.review(rng, rating)
        date = time.gmtime(when)
        yield json.dumps(
            {
                "reviewerID": reviewers[user],
                "asin": asins[item],
                "reviewerName": f"Customer {user + 1}",
                "helpful": [0, 0],
                "reviewText": text,
                "overall": float(rating),
                "summary": summary,
                "unixReviewTime": when,
                "reviewTime": f"{date.tm_mon:02d} {date.tm_mday}, {date.tm_year}",
            }
        )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    # No name and no time in the gzip header: the same lines give the same bytes.
    with (
        atomic(path) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
    ):
        for line in lines:
            packed.write(line.encode() + b"\n")


def main() -> None:
    """Spec: generate_spec(). Outputs: reviews, meta, images (and the folder images next to it), truth, record."""
    with stage("cm3.datasets.sample.generate") as call:
        out = call.outputs
        call.record.update(make_sample(call.spec, out["reviews"], out["meta"], out["images"], out["truth"]))


if __name__ == "__main__":
    main()
