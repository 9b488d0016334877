"""The caption stage: one caption per item, in shards, with provenance.

python -m extractors.caption.stage --spec '{"name": .., "settings": {..}, "identity": {..}}' --runtime '{"threads": 2}'
    --input items=items.parquet --input manifest=images/manifest.parquet
    --output captions=captions.parquet --output record=captions.stage.json
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.tables import CAPTIONS, OK, write_table
from extractors.caption.base import CaptionSpec
from extractors.runtime.job import Job, spec_of
from extractors.runtime.shards import notes_of
from extractors.spec import BackendSpec

log = logging.getLogger(__name__)

LOGGED_CAPTIONS = 3


def caption(
    spec: BackendSpec,
    inputs: Mapping[str, Path],
    captions: Path,
    *,
    name: str = "captioner",
    code: str = "",
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the captions file of all items; return the record: counts, failures, speed.

    In the record, `captions_cut` counts the new captions that were truncated at the limit of tokens; `captions_at_limit`
    counts all captions of so many tokens, earlier ones included.

    The file's metadata contain `model`, `prompt`, `prompt_key` (12 hex digits of the prompt's sha256), `decoding` and, for
    a server, `answered_by`: the models that it reported, over all shards.

    Args:
        spec: the captioner.
        inputs: items and manifest.
        captions: the Parquet file to write.
        name: the captioner's name in the config, for messages and provenance.
        code: digest of the code; finished shards of other code are not used.
        threads: CPU threads of the model.

    Raises:
        UserError: no item has an image, the model cannot be loaded, a CPU would take hours and the spec does not
            allow it, or not a single caption was made.
    """
    job = Job(spec, inputs, captions, name, code, threads)
    texts = np.full(len(job.status), None, dtype=object)
    tokens = np.zeros(len(job.status), np.int32)
    answered_by: dict[str, set[str]] = {}
    for rows, table in job.tables():
        # Of every shard: another model may have answered in an earlier run.
        for kind, values in notes_of(table)["facts"].get("answered_by", {}).items():
            answered_by.setdefault(kind, set()).update(values)
        texts[rows] = table.column("caption").to_pylist()
        tokens[rows] = table.column("tokens").to_numpy()
    texts[job.status != OK] = None
    columns = [
        pa.array(job.source.item_ids, pa.string()),
        pa.array(texts.tolist(), pa.string()),
        pa.array(job.status.tolist(), pa.string()),
        pa.array([job.errors.get(row) for row in range(len(texts))], pa.string()),
        pa.array(tokens),
    ]
    reported = {kind: sorted(values) for kind, values in answered_by.items()}
    provenance = job.provenance() | ({"answered_by": reported} if reported else {})
    write_table(captions, pa.table(columns, names=CAPTIONS.names), CAPTIONS, provenance)
    limit = spec.token_limit() if isinstance(spec, CaptionSpec) else math.inf
    at_limit = int(((job.status == OK) & (tokens >= limit)).sum())
    record = job.finish() | {"tokens": int(tokens.sum()), "captions_at_limit": at_limit}
    _log_captions(name, job, texts, reported.get("models", []), record.get("captions_cut", 0))
    return record


def _log_captions(name: str, job: Job, texts: np.ndarray, models: list[str], cut: int) -> None:
    """Log the first captions, and warn of truncated ones and of more than one model."""
    for row in np.flatnonzero(job.status == OK)[:LOGGED_CAPTIONS]:
        log.info("%s: item %s: %s", name, job.source.item_ids[row], texts[row])
    if cut:
        log.warning("%s: %d captions were cut at max_new_tokens", name, cut)
    if len(models) > 1:
        log.warning("%s: more than one model answered: %s; set model to the one that you want", name, ", ".join(models))


def main() -> None:
    """Run the stage from the command line."""
    with stage("extractors.caption.stage") as call:
        name, spec = spec_of(call)
        threads = call.runtime.get("threads")
        call.record |= caption(spec, call.inputs, call.outputs["captions"], name=name, code=call.code, threads=threads)


if __name__ == "__main__":
    main()
