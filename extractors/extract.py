"""Stage `extract`: one vector per item, in shards, with provenance.

python -m extractors.extract --spec '{"name": .., "settings": {..}, "identity": {..}}' --runtime '{"threads": 2}'
    --input items=items.parquet [--input manifest=..] [--input captions=..] [--input vectors=..]
    --output features=features.parquet --output record=features.stage.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.arrays import zeros
from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.features import write_features
from extractors.runtime.job import Job, spec_of
from extractors.spec import BackendSpec


def extract(
    spec: BackendSpec,
    inputs: Mapping[str, Path],
    features: Path,
    *,
    name: str = "extractor",
    code: str = "",
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the features file of all items; return the record: counts, failures, speed.

    Args:
        spec: the extractor.
        inputs: items, and the other inputs that the spec needs: manifest, captions, vectors.
        features: the Parquet file to write.
        name: the extractor's name in the config, for messages and provenance.
        code: versions of stage and backend, such as "extract 1, timm 1"; outputs of other versions are not used, and
            without it nothing is cached.
        threads: CPU threads of the model.

    Raises:
        UserError: no item has an input, the model cannot be loaded, or it returns NaN or vectors of varying length.
    """
    job = Job(spec, inputs, features, name, code, threads)
    embedding = np.zeros((len(job.status), 0), np.float32)
    for rows, table in job.tables():
        column = table.column("embedding").combine_chunks()
        dim = column.type.list_size
        if embedding.shape[1] == 0:
            embedding = zeros((len(job.status), dim))
        if embedding.shape[1] != dim:
            raise UserError(f"{name}: the model made vectors of {embedding.shape[1]} dimensions, then of {dim}")
        embedding[rows] = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, dim)
    write_features(features, job.source.item_ids, embedding, job.status.tolist(), job.provenance(), spec.dtype)
    return job.finish() | {"dim": embedding.shape[1]}


def main() -> None:
    """Run the stage from the command line."""
    with stage("extractors.extract") as call:
        name, spec = spec_of(call)
        threads = call.runtime.get("threads")
        call.record |= extract(spec, call.inputs, call.outputs["features"], name=name, code=call.code, threads=threads)


if __name__ == "__main__":
    main()
