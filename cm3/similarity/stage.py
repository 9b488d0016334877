"""Stage `similarity`: each item's nearest neighbours by one modality's features."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cm3.common.arrays import blocks, keep_rows, mean_of_rows
from cm3.common.cli import stage
from cm3.common.device import select_device, set_threads
from cm3.common.errors import UserError
from cm3.common.tables import SIMILARITY, read_features, write_table
from cm3.similarity.incremental import kept_path, keys_of, neighbours, read_lists, write_lists

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

    An item without a vector has no rows and is nobody's neighbour (`missing` drop), or has the mean of the others'
    vectors (mean), as in the reference. A vector of zero length has no direction and is left out by either.

    An exact graph is brought up to date where one of much the same items was made by the same code: the result is that
    of a full search to the byte (`cm3.similarity.incremental`). Without a digest of the code nothing is kept.

    Args:
        method: exact, or by faiss hnsw or ivf, whose recall on a sample is measured, logged and written too.
        code: digest of the code; graphs of other code are not taken up.

    Returns:
        Facts for the stage's record: counts of items; of an exact graph how many rows were searched, the others being
        kept; and the recall of an approximate search.

    Raises:
        UserError: no item has a vector, fewer than `knn_k` have one, or faiss is wanted and absent.
    """
    table = read_features(features)
    n_items, ok, vectors, metadata = len(table.ok), table.ok, table.embedding, table.metadata
    if missing == "mean" and ok.any():
        # The mean that training fills in with.
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
            f"{features}: none of its {n_items} items has a vector; leave this modality out or mend its inputs"
        )
    if len(usable) < knn_k:
        raise UserError(
            f"{features}: {len(usable)} items have a vector, fewer than knn_k = {knn_k}; lower model.knn_k to {len(usable)} or less"
        )
    if facts["zero_vectors"]:
        log.warning("%s: %d items have a vector of zero length and get no neighbours", features, facts["zero_vectors"])
    item_ids = [table.item_ids[row] for row in usable]
    del table
    if len(usable) < n_items:
        vectors = keep_rows(vectors, usable)
    described = {"knn_k": knn_k, "method": method, "missing": missing, "features": metadata}
    if method == "exact":
        rows = torch.from_numpy(vectors).to(_searching(device, vectors.nbytes))
        earlier = read_lists(kept_path(output), code) if code else None
        lists, facts["searched"] = neighbours(keys_of(item_ids, vectors), rows, knn_k, earlier)
        indices, scores = lists.indices[:, :knn_k], lists.scores[:, :knn_k]
    else:
        # By name, so that the digest of exact graphs' code does not cover it.
        approximate = import_module("cm3.similarity.approximate")
        *found, measured = approximate.approximate_knn(torch.from_numpy(vectors), knn_k, method)
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
        write_lists(kept_path(output), lists, code)
        log.info(
            "%s items: %s kept, %s searched",
            *(f"{count:,}" for count in (len(usable), len(usable) - facts["searched"], facts["searched"])),
        )
    return facts


def _searching(device: str, size: int) -> str:
    """Return where to search vectors of `size` bytes."""
    if device == "cuda" and 3 * size > torch.cuda.mem_get_info()[0]:
        log.warning("%.1f GB of vectors and their copies do not fit on the GPU; the CPU searches", size / 1e9)
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
