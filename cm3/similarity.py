"""Stage `similarity`: each item's nearest neighbours by one modality's features."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cm3.device import select_device, set_threads
from cm3.neighbours import knn
from stages.command import stage
from stages.errors import UserError
from stages.tables import SIMILARITY, read_features, write_table

log = logging.getLogger("cm3.similarity")


def similarity(*, features: Path, output: Path, knn_k: int, device: str = "cpu") -> dict[str, Any]:
    """Write the `knn_k` nearest items of every item that has a vector, itself included (`stages.tables.SIMILARITY`).

    Items without a vector, or with one of zero length, have no rows and are nobody's neighbours.

    Returns:
        Facts for the stage's record: counts of items.

    Raises:
        UserError: no item has a vector, or fewer than `knn_k` have one.
    """
    table = read_features(features)
    usable = np.flatnonzero(table.ok & (np.linalg.norm(table.embedding, axis=1) > 0))
    facts = {
        "items": len(table.ok),
        "with_vector": int(table.ok.sum()),
        "zero_vectors": int(table.ok.sum()) - len(usable),
    }
    if not len(usable):
        raise UserError(f"{features}: none of its {len(table.ok)} items has a vector; leave this modality out or mend its inputs")  # fmt: skip
    if len(usable) < knn_k:
        raise UserError(f"{features}: {len(usable)} items have a vector, fewer than knn_k = {knn_k}; lower model.knn_k to {len(usable)} or less")  # fmt: skip
    if facts["zero_vectors"]:
        log.warning("%s: %d items have a vector of zero length and get no neighbours", features, facts["zero_vectors"])
    # MPS has no float64, which the exact scores need.
    place = "cpu" if device == "mps" else device
    indices, scores = knn(torch.from_numpy(table.embedding[usable]).to(place), knn_k)
    columns = {
        "item": np.repeat(usable, knn_k).astype(np.int32),
        "neighbour": usable[indices.cpu().numpy().ravel()].astype(np.int32),
        "score": scores.cpu().numpy().ravel(),
    }
    write_table(output, pa.table(columns), SIMILARITY, {"knn_k": knn_k, "features": table.metadata})
    log.info("%d of %d items have neighbours, %d each", len(usable), len(table.ok), knn_k)
    return facts


def main() -> None:
    """Run the stage: spec knn_k; input features; outputs similarity, record."""
    with stage("cm3.similarity") as call:
        set_threads(call.runtime.get("threads"))
        device = select_device(call.runtime.get("device", "auto"))
        call.record["counts"] = similarity(
            features=call.inputs["features"],
            output=call.outputs["similarity"],
            knn_k=call.spec["knn_k"],
            device=device.type,
        )
        call.record["device"] = device.type


if __name__ == "__main__":
    main()
