"""Stage: export a features file as the .npy array that MMRec reads, row i for itemID i."""

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.files import atomic
from cm3.common.tables import INTERACTIONS, read_table
from cm3.datasets.mmrec.export import item_order
from cm3.datasets.mmrec.format import ITEM, ITEM_ID

log = logging.getLogger("cm3.datasets.mmrec.export")


def export_vectors(features: Path, interactions: Path, vectors: Path, missing: Path) -> dict[str, Any]:
    """Write vectors, (N, d) float32 in the order of `item_order`, and a table of the items without vector.

    MMRec does not support missing vectors; as in its own preprocessing, such an item gets the mean of all others.

    Args:
        features: a features file, row i for item i of items.parquet.
        interactions: interactions.parquet, which determines the order.
        vectors: the .npy file to write.
        missing: the tab-separated table to write, columns asin and itemID; only a header where no vector is missing.

    Returns:
        the number of vectors, the number of missing ones among them, and the dimension.

    Raises:
        UserError: no item has a vector.
    """
    found = read_features(features)
    if not found.ok.any():
        raise UserError(f"{features}: no item has a vector")
    embedding = found.embedding.copy()
    embedding[~found.ok] = found.embedding[found.ok].mean(axis=0, dtype=np.float64)
    order = item_order(read_table(interactions, INTERACTIONS), len(found.item_ids))
    with atomic(vectors) as temporary, temporary.open("wb") as file:
        np.save(file, embedding[order])
    absent = np.flatnonzero(~found.ok[order])
    with atomic(missing) as temporary, temporary.open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        writer.writerow((ITEM_ID, ITEM))
        writer.writerows((found.item_ids[order[number]], number) for number in absent.tolist())
    facts = {"vectors": len(order), "missing": len(absent), "dim": embedding.shape[1]}
    log.info(
        "%d vectors of dimension %d; %d items without vector get the mean",
        *(facts[k] for k in ("vectors", "dim", "missing")),
    )
    return facts


def main() -> None:
    """Inputs: features, interactions. Outputs: vectors, missing, record."""
    with stage("cm3.datasets.mmrec.export_vectors") as call:
        facts = export_vectors(
            call.inputs["features"], call.inputs["interactions"], call.outputs["vectors"], call.outputs["missing"]
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
