"""The stage that chooses the weights of a re-ranking, and the evaluation of its lists."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import check_golden
from training_shop import prepared

from cm3.common.embeddings import write_embeddings
from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.interactions import LEARNT_FROM, read_interactions
from cm3.common.stages import STAGES
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.rerank_stage import rerank

SCORES = {"first": "dot", "second": "cosine"}


@pytest.fixture
def shop(tmp_path: Path) -> dict[str, Path]:
    return prepared(tmp_path / "shop")


def files(shop: dict[str, Path], folder: Path, metadata: dict[str, Any] | None = None) -> dict[str, Path]:
    """Embeddings of two models."""
    tables = {name: shop[name] for name in ("interactions", "items", "users")}
    data = read_interactions(**tables)
    rng = np.random.default_rng(5)
    paths = {}
    for model in SCORES:
        for kind, ids in (("user", data.user_ids), ("item", data.item_ids)):
            path = paths[f"{model}.{kind}_embeddings"] = folder / f"{model}-{kind}.parquet"
            vectors = rng.normal(size=(len(ids), 4)).astype(np.float32)
            write_embeddings(path, f"{kind}_id", ids, vectors, metadata or {LEARNT_FROM: data.digest})
    return paths


def fitted(shop: dict[str, Path], folder: Path, paths: dict[str, Path], **changes: Any) -> dict[str, Any]:
    tables = {name: shop[name] for name in ("interactions", "items", "users")}
    settings: dict[str, Any] = {"top": 20, "weights": {}, "grid": [0.0, 0.5, 2.0], "monitor": "recall@5"}
    return rerank(**tables, files=paths, of="first", scores=SCORES, **settings | changes, output=folder / "model.json")


def measured(shop: dict[str, Path], folder: Path, paths: dict[str, Path]) -> dict[str, Any]:
    return evaluate(
        **{name: shop[name] for name in ("interactions", "items", "users")},
        files=paths,
        settings=Evaluation(ks=[5]),
        metrics_output=folder / "evaluation.json",
        per_user_output=folder / "per_user.parquet",
        recommendations_output=folder / "recommendations.parquet",
    )


def test_the_chosen_weights_are_best_on_validation_and_used_in_evaluation(shop: dict[str, Path], tmp_path: Path):
    paths = files(shop, tmp_path)
    facts = fitted(shop, tmp_path, paths)
    values = {row["weights"]["second"]: row["recall@5"] for row in facts["tried"]}
    assert values.keys() == {0.0, 0.5, 2.0}
    assert facts["best_valid"] == max(values.values()) == values[facts["weights"]["second"]]
    assert facts["valid_without"] == values[0.0]
    result = measured(shop, tmp_path, paths | {"rerank": tmp_path / "model.json"})
    assert result["rerank"] == {"of": "first", "weights": facts["weights"], "top": 20}
    assert result["valid"]["recall@5"] == pytest.approx(facts["best_valid"], abs=1e-12)


def test_weight_zero_is_the_base_model(shop: dict[str, Path], tmp_path: Path):
    paths = files(shop, tmp_path)
    fitted(shop, tmp_path, paths, weights={"second": 0.0})
    own = {name.removeprefix("first."): path for name, path in paths.items() if name.startswith("first.")}
    plain = measured(shop, tmp_path, own)
    again = measured(shop, tmp_path, paths | {"rerank": tmp_path / "model.json"})
    assert again["test"] == plain["test"] and again["valid"] == plain["valid"]


def test_the_stage_gives_its_golden_output(shop: dict[str, Path], tmp_path: Path):
    paths = files(shop, tmp_path)
    facts = fitted(shop, tmp_path, paths)
    result = measured(shop, tmp_path, paths | {"rerank": tmp_path / "model.json"})
    outputs = {
        "model": read_json(tmp_path / "model.json"),
        "tried": facts["tried"],
        "recall": result["test"]["recall@5"],
    }
    check_golden("rerank", STAGES["rerank"].version, json.loads(json.dumps(outputs)), tolerance=1e-9)


def test_a_model_of_another_split_is_refused(shop: dict[str, Path], tmp_path: Path):
    paths = files(shop, tmp_path, {LEARNT_FROM: "0" * 64})
    with pytest.raises(UserError, match=r"first-user\.parquet: was trained on other interactions"):
        fitted(shop, tmp_path, paths)


def test_a_cut_off_beyond_the_reranked_items_is_refused(shop: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.top = 3: training\.monitor is recall@5"):
        fitted(shop, tmp_path, files(shop, tmp_path), top=3)
