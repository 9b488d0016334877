"""Stage `control`: features without content, of the same shape as real ones, to measure what a model gains from content.

python -m extractors.control --spec '{"kind": "gaussian", "seed": 1, "modality": "text"}'
    --input features=features.parquet --output features=control.parquet --output record=control.stage.json
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.cli import stage
from cm3.common.features import read_features, write_features

log = logging.getLogger("extractors.control")

BLOCK = 8192
"""Rows that are drawn at a time; only memory depends on it."""


def gaussian(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (N, d) random directions, each row with the length of that row of `vectors`."""
    noise = np.empty_like(vectors)
    for start in range(0, len(vectors), BLOCK):
        real = vectors[start : start + BLOCK].astype(np.float64)
        drawn = rng.standard_normal(real.shape)
        lengths = np.linalg.norm(real, axis=1, keepdims=True)
        noise[start : start + BLOCK] = drawn * (lengths / np.linalg.norm(drawn, axis=1, keepdims=True))
    return noise


def shuffled(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the (N, d) vectors in random order: the content of other items."""
    return vectors[rng.permutation(len(vectors))]


def constant(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (N, d) rows that are all equal, (1, ..., 1) scaled to the mean length of `vectors`."""
    length = np.linalg.norm(vectors, axis=1).mean(dtype=np.float64) if len(vectors) else 0.0
    return np.full_like(vectors, length / np.sqrt(vectors.shape[1]))


CONTROLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "gaussian": gaussian,
    "shuffled": shuffled,
    "constant": constant,
}


def control(*, features: Path, output: Path, kind: str, seed: int, modality: str) -> dict[str, Any]:
    """Write a features file whose vectors have no information about their items. Only ok rows change; statuses do not.

    Args:
        kind: a name of `CONTROLS`.
        seed: seed of the random generator; not used by `constant`.
        modality: part of the seed, so that the noise of different modalities is independent.

    Returns:
        Facts for the stage's record: rows by status.

    Raises:
        UserError: `features` is not a readable features file.
    """
    real = read_features(features)
    rng = np.random.default_rng([seed, *modality.encode()])
    vectors = np.zeros_like(real.embedding)
    vectors[real.ok] = CONTROLS[kind](real.embedding[real.ok], rng)
    provenance = {"control": {"kind": kind, "seed": seed, "modality": modality}, "features": real.metadata}
    write_features(output, real.item_ids, vectors, real.status.tolist(), provenance)
    names, counts = np.unique(real.status.astype(str), return_counts=True)
    log.info("%s replaces %d of %d vectors", kind, real.ok.sum(), len(real.ok))
    return {"items": len(real.ok), **dict(zip(names.tolist(), counts.tolist(), strict=True))}


def main() -> None:
    """Run the stage: spec kind, seed, modality; input features; outputs features, record."""
    with stage("extractors.control") as call:
        call.record["counts"] = control(features=call.inputs["features"], output=call.outputs["features"], **call.spec)


if __name__ == "__main__":
    main()
