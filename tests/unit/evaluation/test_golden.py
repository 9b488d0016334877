"""Golden outputs of the evaluation stage and of every metric."""

import numpy as np
import oracles_cm3 as oracle
import pyarrow.parquet as pq
import pytest
from golden import check_golden, digest, summary
from safetensors.numpy import save_file

from cm3.common.embeddings import write_embeddings
from cm3.common.stages import STAGES
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.metrics import of_hits
from cm3.evaluation.recommendations import publish_recommendations, read_ids
from cm3.evaluation.registry import METRICS, metric_class

USERS, ITEMS = 40, 30


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A shop with embeddings and item weights of small integers, whose products are exact on any CPU."""
    folder = tmp_path_factory.mktemp("shop")
    paths = oracle.write_shop(folder, modalities=())
    rng = np.random.Generator(np.random.PCG64(5))
    for kind, n in (("user", USERS), ("item", ITEMS)):
        vectors = rng.integers(-20, 21, (n, 6)).astype(np.float32)
        path = paths[f"{kind}_embeddings"] = folder / f"{kind}_embeddings.parquet"
        write_embeddings(path, f"{kind}_id", [f"{kind}{i}" for i in range(n)], vectors, {"epoch": 3})
    paths["weights"] = folder / "model.safetensors"
    save_file({"weights": rng.integers(0, 50, (ITEMS, ITEMS)).astype(np.float32)}, paths["weights"])
    return paths


@pytest.mark.parametrize(
    ("name", "inputs", "settings"),
    [
        ("embeddings", ("user_embeddings", "item_embeddings"), {"ks": [3, 10], "mask": "train+valid", "top_n": 5}),
        ("item-weights", ("weights",), {"ks": [5], "top_n": 20}),
    ],
)
def test_the_stage_gives_its_golden_output(shop, tmp_path, name, inputs, settings):
    result = evaluate(
        **{key: shop[key] for key in ("interactions", "items", "users")},
        files={key: shop[key] for key in inputs},
        settings=Evaluation(**settings),
        metrics_output=tmp_path / "evaluation.json",
        per_user_output=tmp_path / "per_user.parquet",
        recommendations_output=tmp_path / "recommendations.parquet",
    )
    # Lists as their readers see them: tables of the same lists, with numbers now and with ids before, are one version.
    ids = read_ids(shop["users"], shop["items"])
    publish_recommendations(tmp_path / "recommendations.parquet", tmp_path / "published.parquet", ids)
    per_user, lists = (pq.read_table(tmp_path / f"{table}.parquet") for table in ("per_user", "published"))
    outputs = {
        "evaluation": _stage_only(result),
        "per_user": {
            column: summary(per_user[column].to_numpy()) for column in per_user.column_names if _of_stage(column)
        },
        "recommendations": {
            "schema": str(lists.schema.remove_metadata()),
            "items": digest(lists.select(["user_id", "item_id", "rank"]).to_pylist()),
            "scores": summary(lists["score"].to_numpy()),
        },
    }
    check_golden(f"evaluate-{name}", STAGES["evaluate"].version, outputs, tolerance=1e-9)


def _stage_only(value):
    """Leave out the metrics that have golden outputs of their own, so that a new one changes none of the stage's."""
    if isinstance(value, dict):
        return {key: _stage_only(part) for key, part in value.items() if _of_stage(key)}
    return value


def _of_stage(name: str) -> bool:
    return "@" not in name or name.partition("@")[0] in ("recall", "ndcg")


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_its_golden_output(name):
    rng = np.random.Generator(np.random.PCG64(8))
    hits = rng.random((50, 20)) < 0.2
    n_truth = hits.sum(1) + rng.integers(0, 9, 50)
    hits[:5], n_truth[:3] = False, 0
    values = of_hits(hits, n_truth, [1, 5, 20])
    outputs = {key: summary(values[key]) for key in (f"{name}@{k}" for k in (1, 5, 20))}
    check_golden(f"metric-{name}", metric_class(name).version, outputs, tolerance=1e-9)
