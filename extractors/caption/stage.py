"""The caption stage: one caption per item, in shards, with provenance.

python -m extractors.caption.stage --spec '{"name": .., "settings": {..}, "identity": {..}}' --runtime '{"threads": 2}'
    --input items=items.parquet --input manifest=images/manifest.parquet
    --output captions=captions.parquet --output record=captions.stage.json
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.tables import CAPTIONS, OK, write_table
from extractors.runtime.job import Job, spec_of
from extractors.runtime.shards import notes_of
from extractors.spec import BackendSpec

log = logging.getLogger(__name__)

CAPTIONS_TOLD = 3


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

    The file's metadata hold `model`, `prompt`, `prompt_key` (12 hex digits of the prompt's sha256), `decoding` and, of
    a server, `answered_by`: what it said that it is, over all shards.

    Args:
        spec: the captioner.
        inputs: items and manifest.
        captions: the Parquet file to write.
        name: the captioner's name in the config, for messages and provenance.
        code: digest of the code; finished shards of other code are not used.
        threads: CPU threads of the model.

    Raises:
        UserError: no item has an image, the model is not to be had, it would take hours on a CPU and the
            spec doesn't allow it, or not one caption came out.
    """
    job = Job(spec, inputs, captions, name, code, threads)
    texts = np.full(len(job.status), None, dtype=object)
    tokens = np.zeros(len(job.status), np.int32)
    answered_by: dict[str, set[str]] = {}
    for rows, table in job.tables():
        # Of every shard, because those of an earlier run may have been answered by another model.
        for name_told, values in notes_of(table)["facts"].get("answered_by", {}).items():
            answered_by.setdefault(name_told, set()).update(values)
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
    models = {field: sorted(values) for field, values in answered_by.items()}
    provenance = job.provenance() | ({"answered_by": models} if models else {})
    write_table(captions, pa.table(columns, names=CAPTIONS.names), CAPTIONS, provenance)
    record = job.finish() | {"tokens": int(tokens.sum())}
    _tell(name, job, texts, models.get("models", []), record.get("captions_cut", 0))
    return record


def _tell(name: str, job: Job, texts: np.ndarray, models: list[str], cut: int) -> None:
    """Show the first captions, and what a reader of them should know."""
    for row in np.flatnonzero(job.status == OK)[:CAPTIONS_TOLD]:
        log.info("%s: item %s: %s", name, job.source.item_ids[row], texts[row])
    if cut:
        log.warning("%s: %d captions were cut at max_new_tokens", name, cut)
    if len(models) > 1:
        log.warning("%s: more than one model answered: %s; name the one that you want", name, ", ".join(models))


def main() -> None:
    """Run the stage from the command line."""
    with stage("extractors.caption.stage") as call:
        name, spec = spec_of(call)
        threads = call.runtime.get("threads")
        call.record |= caption(spec, call.inputs, call.outputs["captions"], name=name, code=call.code, threads=threads)


if __name__ == "__main__":
    main()
