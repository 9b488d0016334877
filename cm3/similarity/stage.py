"""Stage `similarity`: each item's nearest neighbours by one modality's features."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cm3.common.arrays import blocks, keep_rows, mean_of_rows
from cm3.common.cli import stage
from cm3.common.device import select_device, set_threads
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import SIMILARITY, write_table
from cm3.similarity.approximate import approximate_knn
from cm3.similarity.incremental import keys_of, lists_path, neighbours, read_lists, write_lists

log = logging.getLogger("cm3.similarity.stage")


def similarity(
    *,
    features: Path,
    output: Path,
    knn_k: int,
    method: str = "exact",
    missing: str = "drop",
    device: str = "cpu",
    code: str = "",
) -> dict[str, Any]:
    """Write the `knn_k` nearest items of every item that has a vector, itself included (`cm3.common.tables.SIMILARITY`).

    An item without a vector has no rows and is no neighbour (`missing` drop), or has the mean of the other vectors
    (mean), as in the reference implementation. A vector of zero length has no direction and is left out by both.

    An exact graph is updated from that of an earlier run of the same code with similar items; the result is
    byte-identical to a full search (`cm3.similarity.incremental`). Without a code version nothing is stored for it.

    Args:
        method: exact, or the approximate hnsw (of faiss) or ivf, whose recall is measured on a sample, logged and recorded.
        code: version of the code; graphs of another version are not reused.

    Returns:
        Facts for the stage's record: counts of items; for exact search the number of rows searched, the others being
        reused; for approximate search its recall.

    Raises:
        UserError: no item has a vector, fewer than `knn_k` have one, or hnsw needs faiss and it is not installed.
    """
    table = read_features(features)
    n_items, ok, vectors, metadata = len(table.ok), table.ok, table.embedding, table.metadata
    if missing == "mean" and ok.any():
        # The same mean as in training.
        vectors[~ok] = mean_of_rows(vectors, ok)
    directed = np.concatenate([vectors[rows].any(axis=1) for rows in blocks(n_items)] or [ok])
    usable = np.flatnonzero(directed)
    facts: dict[str, Any] = {
        "items": n_items,
        "with_vector": int(ok.sum()),
        "zero_vectors": int((ok & ~directed).sum()),
    }
    if not len(usable):
        raise UserError(
            f"{features}: none of its {n_items} items has a vector; leave this modality out or fix its inputs"
        )
    if len(usable) < knn_k:
        raise UserError(
            f"{features}: {len(usable)} items have a vector, fewer than knn_k = {knn_k}; lower model.knn_k to {len(usable)} or less"
        )
    if facts["zero_vectors"]:
        log.warning("%s: %d items have a vector of zero length and no neighbours", features, facts["zero_vectors"])
    item_ids = [table.item_ids[row] for row in usable]
    del table
    if len(usable) < n_items:
        vectors = keep_rows(vectors, usable)
    described = {"knn_k": knn_k, "method": method, "missing": missing, "features": metadata}
    if method == "exact":
        rows = torch.from_numpy(vectors).to(_search_device(device, vectors.nbytes))
        earlier = read_lists(lists_path(output), code) if code else None
        lists, facts["searched"] = neighbours(keys_of(item_ids, vectors), rows, knn_k, earlier)
        indices, scores = lists.indices[:, :knn_k], lists.scores[:, :knn_k]
    else:
        *found, measured = approximate_knn(torch.from_numpy(vectors), knn_k, method)
        indices, scores = (one.numpy() for one in found)
        facts |= measured
        described |= measured
        log.info(
            "%s: recall %.4f against exact search on %d items", method, measured["recall"], measured["recall_rows"]
        )
    columns = {
        "item": np.repeat(usable, knn_k).astype(np.int32),
        "neighbour": usable[indices.ravel()].astype(np.int32),
        "score": scores.ravel(),
    }
    write_table(output, pa.table(columns), SIMILARITY, described)
    log.info("%d of %d items have neighbours, %d each", len(usable), n_items, knn_k)
    if method == "exact" and code:
        write_lists(lists_path(output), lists, code)
        log.info(
            "%s items: %s kept, %s searched",
            *(f"{count:,}" for count in (len(usable), len(usable) - facts["searched"], facts["searched"])),
        )
    return facts


def _search_device(device: str, size: int) -> str:
    """Return the device on which to search vectors of `size` bytes."""
    if device == "cuda" and 3 * size > torch.cuda.mem_get_info()[0]:
        log.warning("%.1f GB of vectors and their copies do not fit on the GPU; searching on the CPU", size / 1e9)
        return "cpu"
    # MPS has no float64, which the exact scores need.
    return "cpu" if device == "mps" else device


def main() -> None:
    """Run the stage: spec knn_k, method, missing; input features; outputs similarity, record."""
    with stage("cm3.similarity.stage") as call:
        set_threads(call.runtime.get("threads"))
        device = select_device(call.runtime.get("device", "auto"))
        call.record["counts"] = similarity(
            features=call.inputs["features"],
            output=call.outputs["similarity"],
            knn_k=call.spec["knn_k"],
            method=call.spec["method"],
            missing=call.spec["missing"],
            device=device.type,
            code=call.code,
        )
        call.record["device"] = device.type


if __name__ == "__main__":
    main()
