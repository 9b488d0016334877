"""Stage `reduce`: wide features to their first principal components, so that training costs what narrow features cost.

python -m extractors.reduce --spec '{"method": "pca", "dim": 512}' --input features=features.parquet
    --output features=reduced.parquet --output projection=reduced.safetensors --output record=reduced.stage.json
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.cli import stage
from cm3.common.features import read_features, write_features
from cm3.common.pca import fit_pca
from cm3.common.reduction import Reduction
from cm3.common.strict import validate

log = logging.getLogger("extractors.reduce")

LEAST_EXPLAINED = 0.9
"""Share of the variance below which the log warns."""


def reduce(
    *, features: Path, output: Path, projection: Path, reduction: Reduction, threads: int | None = None
) -> dict[str, Any]:
    """Write features reduced to fewer numbers (float32), and the projection for vectors of new items.

    The projection is fitted to all items with a vector: their content alone, no interactions. Statuses do not change.

    Args:
        features: the wide features.
        output, projection: the files to write.
        threads: number of CPU threads; the result does not depend on it.

    Returns:
        Facts for the stage's record: rows by status, numbers of a vector before and after, explained variance.

    Raises:
        UserError: `features` is not a readable features file, its vectors are not longer than `reduction.dim`, or not more.
    """
    wide = read_features(features)
    width = wide.embedding.shape[1]
    reduction.check(width, int(wide.ok.sum()), str(features))
    fitted = fit_pca(wide.embedding, reduction.dim, wide.ok, threads)
    facts: dict[str, Any] = {"from": width, "dim": reduction.dim, "explained_variance": fitted.explained_variance}
    reduced = fitted.project(wide.embedding, threads)
    provenance = {"reduce": reduction.identity() | facts, "features": wide.metadata}
    write_features(output, wide.item_ids, reduced, wide.status.tolist(), provenance)
    fitted.save(projection)
    names, counts = np.unique(wide.status.astype(str), return_counts=True)
    log.info(
        "%d numbers reduced to %d, which keep %.1f %% of the variance",
        width,
        reduction.dim,
        100 * facts["explained_variance"],
    )
    if facts["explained_variance"] < LEAST_EXPLAINED:
        log.warning(
            "%s: %d of %d numbers keep only %.1f %% of the variance; a larger reduce.dim keeps more",
            *(features, reduction.dim, width, 100 * facts["explained_variance"]),
        )
    return facts | {"counts": {"items": len(wide.ok), **dict(zip(names.tolist(), counts.tolist(), strict=True))}}


def main() -> None:
    """Run the stage: spec of `Reduction`; input features; outputs features, projection, record."""
    with stage("extractors.reduce") as call:
        facts = reduce(
            features=call.inputs["features"],
            output=call.outputs["features"],
            projection=call.outputs["projection"],
            reduction=validate(Reduction, call.spec, "reduce"),
            threads=call.runtime.get("threads"),
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
