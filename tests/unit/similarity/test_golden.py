"""Golden outputs of the similarity stage: exact graphs to the last digit, approximate ones by their scores."""

import numpy as np
import pytest
from golden import check_golden, digest, summary

from cm3.common.features import write_features
from cm3.common.stages import STAGES
from cm3.common.tables import SIMILARITY, read_metadata, read_table
from cm3.similarity.methods import InvertedFile
from cm3.similarity.stage import similarity


@pytest.fixture
def features(tmp_path):
    """300 vectors in groups, with equal rows, a row of zeros, and rows without a vector."""
    rng = np.random.Generator(np.random.PCG64(11))
    # Sums of small integers: the same on every machine, with many equal cosines.
    vectors = (rng.integers(-3, 4, (12, 9))[rng.integers(0, 12, 300)] + rng.integers(-1, 2, (300, 9))).astype(
        np.float32
    )
    vectors[20:40], vectors[77] = vectors[5], 0
    status = ["ok"] * 300
    status[3], status[250] = "missing", "failed"
    write_features(tmp_path / "features.parquet", [f"i{n}" for n in range(300)], vectors, status, {"model": "m"})
    return tmp_path / "features.parquet"


@pytest.mark.parametrize("missing", ["drop", "mean"])
def test_exact_search_gives_its_golden_output(features, tmp_path, missing):
    facts = similarity(features=features, output=tmp_path / "s.parquet", knn_k=7, missing=missing)
    table = read_table(tmp_path / "s.parquet", SIMILARITY)
    outputs = {
        "facts": facts,
        "metadata": read_metadata(tmp_path / "s.parquet"),
        "neighbours": digest(table.select(["item", "neighbour"]).to_pylist()),
        "scores": digest(table.column("score").to_numpy().view(np.int32).tolist()),
        "first": table.slice(0, 7).to_pylist(),
    }
    check_golden(f"similarity-exact-{missing}", STAGES["similarity"].version, outputs, tolerance=0)


@pytest.mark.parametrize(("method", "version"), [("hnsw", STAGES["similarity"].version), ("ivf", InvertedFile.version)])
def test_approximate_search_gives_its_golden_output(features, tmp_path, method, version):
    if method == "hnsw":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    facts = similarity(features=features, output=tmp_path / "s.parquet", knn_k=7, method=method)
    table = read_table(tmp_path / "s.parquet", SIMILARITY)
    # Another CPU may find other candidates: what is compared is how good they are.
    outputs = {"facts": facts, "items": digest(table["item"].to_pylist()), "scores": summary(table["score"].to_numpy())}
    check_golden(f"similarity-{method}", version, outputs, tolerance=0.02)
