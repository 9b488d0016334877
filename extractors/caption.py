"""The caption stage: one caption per item, in shards, with provenance.

python -m extractors.caption --spec '{"name": .., "settings": {..}, "identity": {..}}' --runtime '{"threads": 2}'
    --input items=items.parquet --input manifest=images/manifest.parquet
    --output captions=captions.parquet --output record=captions.stage.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from extractors.job import Job, spec_of
from extractors.spec import ExtractorSpec
from stages.command import stage
from stages.tables import CAPTIONS, OK, write_table


def caption(
    spec: ExtractorSpec,
    inputs: Mapping[str, Path],
    captions: Path,
    *,
    name: str = "captioner",
    code: str = "",
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the captions file of all items; return the record: counts, failures, speed.

    Args:
        spec: the captioner.
        inputs: items and manifest.
        captions: the Parquet file to write.
        name: the captioner's name in the config, for messages and provenance.
        code: digest of the code; finished shards of other code are not used.
        threads: processor threads of the model.

    Raises:
        UserError: no item has a picture, the model is not to be had, it would take hours on a processor and the
            spec doesn't allow it, or not one caption came out.
    """
    job = Job(spec, inputs, captions, name, code, threads)
    texts = np.full(len(job.status), None, dtype=object)
    tokens = np.zeros(len(job.status), np.int32)
    for rows, table in job.tables():
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
    write_table(captions, pa.table(columns, names=CAPTIONS.names), CAPTIONS, job.provenance())
    return job.finish() | {"tokens": int(tokens.sum())}


def main() -> None:
    """Run the stage from the command line."""
    with stage("extractors.caption") as call:
        name, spec = spec_of(call)
        threads = call.runtime.get("threads")
        call.record |= caption(spec, call.inputs, call.outputs["captions"], name=name, code=call.code, threads=threads)


if __name__ == "__main__":
    main()
