"""Write the noise control of a features file: Gaussian vectors with each item's own norm.

python benchmarks/noise.py processed/hm/features/text/minilm-*.parquet noise/text.parquet
"""

import sys
from pathlib import Path

import numpy as np

from stages.tables import read_features, write_features


def main(source: Path, target: Path, seed: int = 0) -> None:
    """Keep ids, statuses and norms of `source`; draw every direction anew."""
    features = read_features(source)
    vectors = np.random.default_rng(seed).normal(size=features.embedding.shape)
    norms = np.linalg.norm(features.embedding, axis=1) / np.linalg.norm(vectors, axis=1)
    write_features(target, features.item_ids, vectors * norms[:, None], features.status, {"noise": seed})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
