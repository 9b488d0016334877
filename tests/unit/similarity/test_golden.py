"""Golden output of the similarity stage: other neighbours or scores need another version."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from golden import check_golden, summary

from cm3.common.stages import STAGES
from cm3.common.tables import write_features
from cm3.similarity.stage import similarity


@pytest.mark.parametrize("missing", ["drop", "mean"])
def test_similarity_gives_its_golden_output(tmp_path, missing):
    rng = np.random.Generator(np.random.PCG64(5))
    vectors = rng.standard_normal((60, 12)).astype(np.float32)
    vectors[7] = vectors[3]  # a tie
    status = np.array(["ok"] * 60, dtype=object)
    status[[11, 40]] = "missing"
    path = tmp_path / "features.parquet"
    write_features(path, [f"i{row}" for row in range(60)], vectors, status, {})
    similarity(features=path, output=tmp_path / "graph.parquet", knn_k=5, missing=missing)
    table = pq.read_table(tmp_path / "graph.parquet")
    outputs = {
        "item": table["item"].to_pylist(),
        "neighbour": table["neighbour"].to_pylist(),
        "score": summary(table["score"].to_numpy()),
    }
    check_golden(f"similarity-{missing}", STAGES["similarity"].version, outputs)
