"""Stage: product pictures -> shards of their original bytes and a manifest with one row per item."""

import importlib
import itertools
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from sources.config import FINDERS
from sources.finding import Find, Found, Wanted
from sources.picture import Picture, UnreadableError, examine
from sources.shards import SHARD_BYTES, ShardWriter
from stages.command import stage
from stages.pictures import shard_path
from stages.progress import Progress
from stages.tables import FAILED, ITEMS, MANIFEST, OK, read_table, write_table

log = logging.getLogger("sources.images")

_AT_ONCE = 64


@dataclass(frozen=True)
class _Outcome:
    status: str
    error: str
    url: str
    picture: Picture | None = None
    data: bytes = b""


def collect_pictures(
    spec: dict[str, Any],
    runtime: dict[str, Any],
    items: Path,
    inputs: dict[str, Path],
    manifest: Path,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Find every item's picture, check that it decodes, and store the bytes of those that do.

    An item without a picture is `missing`, one whose picture cannot be used is `failed` with the reason; each
    item has its row in the manifest, in item order. Identical pictures are stored once.

    Args:
        spec: a data set's images_spec().
        runtime: its images_runtime(), and threads for decoding.
        items: items.parquet.
        inputs: its image_inputs().
        manifest: file to write; shards go beside it.
        shard_bytes: at most so many bytes of pictures a shard (one picture may be larger).

    Returns:
        counts by status, of distinct pictures, shards and bytes, and the first failures.

    Raises:
        UserError: the pictures' folder does not exist, or fetching is impossible.
    """
    table = read_table(items, ITEMS)
    wanted = [
        Wanted(item_id, references)
        for item_id, references in zip(
            table.column("item_id").to_pylist(), table.column("image_urls").to_pylist(), strict=True
        )
    ]
    downloads = manifest.parent / ".downloads"
    manifest.unlink(missing_ok=True)  # Its shards are about to be replaced.
    find: Find = importlib.import_module(FINDERS[spec["find"]]).find
    columns: dict[str, list[Any]] = {name: [] for name in MANIFEST.names}
    sizes: dict[tuple[int, int], int] = {}
    failures: list[str] = []
    with ShardWriter(manifest, shard_bytes) as shards, Progress(len(wanted), "pictures") as progress:
        found = find(wanted, spec, runtime, inputs, downloads)
        for item, outcome in zip(wanted, _examined(found, spec, runtime.get("threads")), strict=True):
            picture, place = outcome.picture, None
            if picture is not None:
                place = shards.add(picture.sha256, outcome.data)
                sizes[place] = len(outcome.data)
            elif outcome.status == FAILED:
                failures.append(f"{item.item_id}: {outcome.url}: {outcome.error}")
            row = (
                item.item_id, outcome.status, outcome.error or None, outcome.url or None,
                picture and picture.sha256, picture and picture.width, picture and picture.height,
                picture and picture.format, place and place[0], place and place[1],
            )  # fmt: skip
            for name, value in zip(MANIFEST.names, row, strict=True):
                columns[name].append(value)
            progress.advance(1, **{outcome.status: 1})
    for number in itertools.count(shards.count):
        stale = shard_path(manifest, number)
        if not stale.exists():
            break
        stale.unlink()
    types = {field.name: pa.string() if field.name == "status" else field.type for field in MANIFEST}
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    arrays["status"] = arrays["status"].dictionary_encode().cast(MANIFEST.field("status").type)
    write_table(manifest, pa.table(arrays), MANIFEST)
    shutil.rmtree(downloads, ignore_errors=True)
    for failure in failures[:10]:
        log.warning("failed: %s", failure)
    counts = Counter(columns["status"])
    if wanted and not counts[OK]:
        log.warning("none of the %d items has a picture; the first: %s", len(wanted), columns["error"][0])
    return {
        "items": len(wanted),
        **{f"pictures_{status}": counts[status] for status in (OK, "missing", FAILED)},
        "distinct_pictures": len(sizes),
        "picture_bytes": sum(sizes.values()),
        "shards": shards.count,
        "first_failures": failures[:20],
    }


def _examined(found: Iterator[Found], spec: dict[str, Any], threads: int | None) -> Iterator[_Outcome]:
    def look(place: Found) -> _Outcome:
        if place.path is None:
            return _Outcome(place.status, place.error, place.url)
        try:
            data = _read(place.path, spec["max_bytes"])
            return _Outcome(OK, "", place.url, examine(data, spec["max_pixels"]), data)
        except (UnreadableError, OSError) as error:
            return _Outcome(FAILED, str(error), place.url)

    # Threads, because Pillow's decoders let go of the interpreter lock; in blocks, so that few pictures are in memory.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        while block := list(itertools.islice(found, _AT_ONCE)):
            yield from pool.map(look, block)


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableError(f"more than the {max_bytes} bytes allowed")
    return data


def main() -> None:
    """Spec: images_spec(). Runtime: images_runtime(). Inputs: items and image_inputs(). Outputs: manifest, record."""
    with stage("sources.images") as call:
        inputs = {name: path for name, path in call.inputs.items() if name != "items"}
        facts = collect_pictures(call.spec, call.runtime, call.inputs["items"], inputs, call.outputs["manifest"])
        call.record.update(facts)


if __name__ == "__main__":
    main()
