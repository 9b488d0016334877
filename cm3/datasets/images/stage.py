"""Stage: product images -> shards of their original bytes and a manifest with one row per item."""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.http import without_secrets
from cm3.common.progress import Progress
from cm3.common.tables import FAILED, ITEMS, MADE_FROM, MANIFEST, MISSING, OK, read_table, write_table
from cm3.datasets.images.shards import SHARD_BYTES, ShardWriter, append_images, fresh_folder, put_in_place
from cm3.datasets.images.source import Find, Found, Search, Wanted
from cm3.datasets.images.stored import StoredImages
from cm3.datasets.registry import image_source

log = logging.getLogger("cm3.datasets.images.stage")

_LONGEST_ERROR = 400
_SHA256 = MANIFEST.names.index("sha256")


def collect_images(
    spec: dict[str, Any],
    runtime: dict[str, Any],
    items: Path,
    inputs: dict[str, Path],
    manifest: Path,
    shard_bytes: int = SHARD_BYTES,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Find the image of every item, validate it, and store its original bytes.

    An item without an image, or with a placeholder, is `missing`; an item with an unusable image is `failed` with the
    reason. The manifest has one row per item, in item order. Identical images are stored once. New images are appended:
    shards of earlier runs stay as they are while all their images are used. An interruption at any moment changes no byte
    of the outcome, and images are read in the same order whatever the history of their shards.

    Args:
        spec: a data set's images_spec().
        runtime: its images_runtime(), and threads for decoding.
        items: items.parquet.
        inputs: its image_inputs().
        manifest: file to write; shards are written next to it.
        shard_bytes: largest number of image bytes per shard (one image may be larger).
        made_from: keys of the settings by stage, for the metadata of the manifest.

    Returns:
        counts by status and by reason (rows; one with several reasons counts for each), of distinct images, bytes,
        shards and those of earlier runs among them, the first failures; for images from URLs also the number known
        before, the URLs requested, and seconds and images per second of the download.

    Raises:
        UserError: the folder of images does not exist, or no download is possible.
    """
    table = read_table(items, ITEMS)
    wanted = [
        Wanted(item_id, [reference for reference in references or [] if reference and reference.strip()])
        for item_id, references in zip(
            table.column("item_id").to_pylist(), table.column("image_urls").to_pylist(), strict=True
        )
    ]
    manifest.unlink(missing_ok=True)  # Its shards are about to change.
    folder = manifest.parent
    fresh = fresh_folder(folder)
    stored = StoredImages(folder)
    search = Search(wanted, spec, runtime, inputs, folder, stored, fresh)
    find: Find = image_source(spec["find"])
    rows: list[tuple[Any, ...]] = []
    used: dict[str, int] = {}
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    with (
        ShardWriter(fresh / manifest.name, shard_bytes) as shards,
        Progress(len(wanted), "images") as progress,
    ):
        for item, found in zip(wanted, find(search), strict=True):
            error = _error(found)
            if found.image is not None:
                sha256 = found.image.sha256
                if sha256 not in stored:
                    shards.add(sha256, found.data)
                used.setdefault(sha256, stored.length(sha256) if sha256 in stored else len(found.data))
            elif found.status == FAILED:
                failures.append(f"{item.item_id}: {without_secrets(found.url)}: {error}")
            kinds.update(set(found.kinds))
            rows.append(_row(item, found, error))
            progress.advance(1, **{found.status: 1})
        places, kept = append_images(shards, stored, list(used))
    rows = [(*row, *(places[row[_SHA256]] if row[_SHA256] else (None, None))) for row in rows]
    _write_manifest(fresh / "manifest.parquet", rows, {MADE_FROM: dict(made_from)} if made_from else None)
    put_in_place(fresh, manifest, kept)
    shutil.rmtree(folder / ".downloads", ignore_errors=True)
    counts = Counter(row[1] for row in rows)
    for failure in failures[:10]:
        log.warning("failed: %s", failure)
    often = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(5))
    log.info(
        "%d items: %d images, %d missing, %d failed%s",
        len(wanted),
        counts[OK],
        counts[MISSING],
        counts[FAILED],
        often and f"; most often: {often}",
    )
    if wanted and not counts[OK]:
        log.warning("none of the %d items has an image; the first: %s", len(wanted), rows[0][2])
    return {
        "items": len(wanted),
        **{f"images_{status}": counts[status] for status in (OK, MISSING, FAILED)},
        "reasons": dict(kinds.most_common()),
        "distinct_images": len(used),
        "image_bytes": sum(used.values()),
        "shards": len({shard for shard, _ in places.values()}),
        "shards_kept": len(kept),
        "first_failures": failures[:20],
        **search.facts,
    }


def _error(found: Found) -> str | None:
    error = "; ".join(dict.fromkeys(found.reasons))
    return (error if len(error) <= _LONGEST_ERROR else error[: _LONGEST_ERROR - 3] + "...") or None


def _row(item: Wanted, found: Found, error: str | None) -> tuple[Any, ...]:
    """Return a row of the manifest without the columns `shard` and `row`, which are the last."""
    image = found.image
    return (
        item.item_id,
        found.status,
        error,
        found.url or None,
        image and image.sha256,
        image and image.width,
        image and image.height,
        image and image.format,
    )


def _write_manifest(path: Path, rows: list[tuple[Any, ...]], metadata: dict[str, Any] | None) -> None:
    columns = {name: [row[number] for row in rows] for number, name in enumerate(MANIFEST.names)}
    types = {field.name: pa.string() if field.name == "status" else field.type for field in MANIFEST}
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    arrays["status"] = arrays["status"].dictionary_encode().cast(MANIFEST.field("status").type)
    write_table(path, pa.table(arrays), MANIFEST, metadata)


def main() -> None:
    """Spec: images_spec(). Runtime: images_runtime(). Inputs: items and image_inputs(). Outputs: manifest, record."""
    with stage("cm3.datasets.images.stage") as call:
        inputs = {name: path for name, path in call.inputs.items() if name != "items"}
        manifest = call.outputs["manifest"]
        facts = collect_images(
            call.spec, call.runtime, call.inputs["items"], inputs, manifest, made_from=call.made_from
        )
        call.record.update(facts)
        call.parts += sorted(manifest.parent.glob("shard-*.parquet"))


if __name__ == "__main__":
    main()
