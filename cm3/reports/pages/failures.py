"""Failed and missing images, captions, vectors and texts by reason, with a few examples."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.files import read_json
from cm3.common.tables import CAPTIONS, MANIFEST, OK, read_metadata, read_table
from cm3.reports.pages.item_cards import Shop

EXAMPLES, KINDS = 5, 12
_DETAIL = re.compile(r"b'.*'|b\".*\"|\([^)]*\)|\d+|\S+/\S+")


def failures_of(shop: Shop, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return a table of failures for each kind of input, by reason, most frequent first; inputs without any are skipped.

    Captions that were cut at the limit of tokens are listed, too.

    Args:
        shop: the dataset's tables.
        inputs: `manifest`, and for each modality M `captions.M` and `record.extract.M`, if they exist.
    """
    found = []
    if "manifest" in inputs:
        table = read_table(inputs["manifest"], MANIFEST)
        found.append(
            {"what": "Images", **_rows(shop, table.column("status").to_pylist(), table.column("error").to_pylist())}
        )
    for name, path in inputs.items():
        if name.startswith("captions."):
            table = read_table(path, CAPTIONS)
            rows = _rows(shop, table.column("status").to_pylist(), table.column("error").to_pylist())
            rows["kinds"] += _cut(shop, table, read_metadata(path).get("decoding", {}))
            found.append({"what": f"Captions ({name.removeprefix('captions.')})", **rows})
    for name, path in inputs.items():
        if name.startswith("record.extract."):
            modality = name.removeprefix("record.extract.")
            own = {"what": f"Vectors ({modality})", **_recorded(shop, read_json(path))}
            found.append(_without_repeats(own, found, modality))
    missing = [
        OK if any((shop.titles[i], shop.brands[i], shop.categories[i])) else "missing"
        for i in range(len(shop.item_ids))
    ]
    texts = _rows(shop, missing, ["neither title nor brand nor categories"] * len(missing))
    found.append({"what": "Texts", **texts})
    return [one for one in found if one["kinds"] or (one.get("same_as") and one["count"])]


def _without_repeats(own: dict[str, Any], before: list[dict[str, Any]], modality: str) -> dict[str, Any]:
    """Return the failures of an extraction without those that a table before it shows: no image, or no caption."""
    sources = (f"Captions ({modality})", "Images")
    source = next((one for name in sources for one in before if one["what"] == name and one["kinds"]), None)
    if source is None or own["count"] > source["count"] or not own["failed"] <= source["failed"]:
        return own
    return own | {"kinds": [], "more": 0, "same_as": source["what"]}


def _rows(shop: Shop, status: list[str], errors: list[str | None]) -> dict[str, Any]:
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for item, (state, error) in enumerate(zip(status, errors, strict=True)):
        if state != OK:
            kinds[state, _kind(error)].append(item)
    ranked = sorted(kinds.items(), key=lambda one: (-len(one[1]), one[0]))
    return {
        "kinds": [
            {
                "status": state,
                "kind": kind,
                "count": len(items),
                "examples": [{**shop.card(item), "error": errors[item]} for item in items[:EXAMPLES]],
            }
            for (state, kind), items in ranked[:KINDS]
        ],
        "more": sum(len(items) for _, items in ranked[KINDS:]),
        "count": sum(len(items) for _, items in ranked),
        "total": len(status),
        "failed": {shop.item_ids[item] for items in kinds.values() for item in items},
    }


def _cut(shop: Shop, captions: pa.Table, decoding: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return captions with as many tokens as the model may generate, as a row of the table; they count as ok."""
    limit = decoding.get("max_new_tokens", math.inf) + decoding.get("max_thought_tokens", 0)
    states = zip(captions.column("status").to_pylist(), captions.column("tokens").to_pylist(), strict=True)
    items = [item for item, (state, tokens) in enumerate(states) if state == OK and tokens >= limit]
    examples = [{**shop.card(item), "error": None} for item in items[:EXAMPLES]]
    kind = f"cut at the limit of {limit} tokens"
    return [{"status": OK, "kind": kind, "count": len(items), "examples": examples}] if items else []


def _recorded(shop: Shop, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the failures of an extraction from its record, which counts all and lists the first."""
    numbers = {item_id: item for item, item_id in enumerate(shop.item_ids)}
    status = [OK] * len(shop.item_ids)
    errors: list[str | None] = [None] * len(shop.item_ids)
    named = [failure for failure in record.get("failures", []) if failure["item_id"] in numbers]
    for failure in named:
        status[numbers[failure["item_id"]]] = "failed"
        errors[numbers[failure["item_id"]]] = failure.get("reason")
    rows = _rows(shop, status, errors)
    counts = record.get("counts", {})
    failed, missing = counts.get("failed", 0), counts.get("missing", 0)
    if missing:
        rows["kinds"].append({"status": "missing", "kind": "no input", "count": missing, "examples": []})
    rows["more"] += max(0, failed - len(named))
    return rows | {"count": failed + missing}


def _kind(error: str | None) -> str:
    """Return an error without the parts that differ between items: paths, numbers, brackets, bytes."""
    if not error:
        return "no input"
    return _DETAIL.sub("\N{HORIZONTAL ELLIPSIS}", error).strip(" :;")[:120]
