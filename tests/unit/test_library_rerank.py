"""Re-ranking in the library: the weights and lists of the pipeline, and a model that is saved, loaded and asked with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from library_shop import QUICK, SMALL, shop
from training_shop import prepared

import cm3
from cm3.baselines.ease import EASE
from cm3.baselines.inputs import Inputs
from cm3.common.device import select_device
from cm3.common.embeddings import write_embeddings
from cm3.common.errors import UserError
from cm3.common.interactions import LEARNT_FROM, read_interactions
from cm3.common.tensors import write_tensors
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.item_weights import ItemWeights
from cm3.evaluation.rerank_config import Rerank
from cm3.evaluation.rerank_stage import rerank
from cm3.library import fitting
from cm3.library.reranking import fit_reranking

BY: dict[str, Any] = {"by": {"ease": {"l2": 20}, "itemknn-content": {}}, "top": 12, "grid": [0, 0.5, 2]}


@pytest.fixture(scope="module")
def plain() -> cm3.Recommender:
    pairs, features, items = shop()
    return cm3.fit(pairs, features, items, SMALL, {**QUICK, "epochs": 3, "monitor": "recall@10"})


@pytest.fixture(scope="module")
def reranked() -> cm3.Recommender:
    pairs, features, items = shop()
    return cm3.fit(pairs, features, items, SMALL, {**QUICK, "epochs": 3, "monitor": "recall@10"}, rerank=BY)


def test_weights_and_lists_are_those_of_the_pipeline(tmp_path: Path):
    paths = prepared(tmp_path)
    tables = {name: paths[name] for name in ("interactions", "items", "users")}
    data = read_interactions(**tables)
    rng = np.random.default_rng(5)
    users, items = (rng.normal(size=(len(ids), 4)).astype(np.float32) for ids in (data.user_ids, data.item_ids))
    weights = EASE(l2=20).solve(Inputs(data.matrix("train"), {}, {}, {}), select_device("cpu"))
    assert isinstance(weights, ItemWeights)
    files = {f"base.{kind}_embeddings": tmp_path / f"{kind}.parquet" for kind in ("user", "item")}
    for kind, ids, vectors in (("user", data.user_ids, users), ("item", data.item_ids, items)):
        write_embeddings(files[f"base.{kind}_embeddings"], f"{kind}_id", ids, vectors, {LEARNT_FROM: data.digest})
    files["ease.weights"] = tmp_path / "ease.safetensors"
    write_tensors(files["ease.weights"], weights.tensors(), {LEARNT_FROM: data.digest})
    settings = Rerank(of="base", by=["ease"], top=20, grid=[0.0, 0.5, 2.0])
    facts = rerank(
        **tables,
        files=files,
        of="base",
        scores={"base": "dot", "ease": "dot"},
        top=20,
        weights={},
        grid=settings.grid,
        monitor="recall@5",
        output=tmp_path / "model.json",
    )
    outputs = {f"{name}_output": tmp_path / name for name in ("metrics", "per_user", "recommendations")}
    chosen = Evaluation(ks=[5], top_n=8)
    evaluate(**tables, files=files | {"rerank": tmp_path / "model.json"}, settings=chosen, **outputs)

    base = cm3.Recommender(data.user_ids, data.item_ids, users, items, data.matrix("train"))
    part = replace(base, users=users[:, :0], items=items[:, :0], seen=None, weights=weights)
    found = fit_reranking(base, {"ease": part}, settings, data.matrix("train"), data.truth("valid"), "recall@5")
    assert found.weights == facts["weights"] and found.tried == facts["tried"] and found.weights["ease"] > 0
    lists = pq.read_table(outputs["recommendations_output"]).to_pylist()
    asked = list(dict.fromkeys(data.user_ids[row["user"]] for row in lists))
    wanted = [
        [(data.item_ids[row["item"]], row["score"]) for row in lists if data.user_ids[row["user"]] == user]
        for user in asked
    ]
    assert cm3.recommend(replace(base, reranking=found), asked, k=8) == wanted


def test_only_the_first_items_are_ordered_anew(plain: cm3.Recommender, reranked: cm3.Recommender):
    assert np.array_equal(reranked.users, plain.users) and np.array_equal(reranked.items, plain.items)
    assert reranked.reranking is not None and reranked.reranking.parts.keys() == BY["by"].keys()
    assert len(reranked.reranking.tried) == 9
    changed = replace(reranked, reranking=replace(reranked.reranking, weights={"ease": 2.0, "itemknn-content": 0.5}))
    users = plain.user_ids
    before, after = ([[i for i, _ in one] for one in cm3.recommend(m, users, k=20)] for m in (plain, changed))
    assert before != after
    for old, new in zip(before, after, strict=True):
        assert set(old[:12]) == set(new[:12]) and old[12:] == new[12:]
    none = replace(reranked, reranking=replace(reranked.reranking, weights={"ease": 0.0, "itemknn-content": 0.0}))
    assert [[i for i, _ in one] for one in cm3.recommend(none, users, k=20)] == before
    assert [i for i, _ in cm3.recommend(changed, users[3], k=20)] == after[3]


def test_a_reranked_model_is_saved_loaded_and_asked_like_others(reranked: cm3.Recommender, tmp_path: Path):
    reranked.save(tmp_path)
    loaded = cm3.load(tmp_path)
    assert loaded.reranking is not None and reranked.reranking is not None
    assert loaded.reranking.weights == reranked.reranking.weights and loaded.reranking.tried == reranked.reranking.tried
    assert cm3.recommend(loaded, ["u3", "u4"], k=6) == cm3.recommend(reranked, ["u3", "u4"], k=6)
    assert cm3.recommend_for(loaded, ["i1", "i3"], k=4) == cm3.recommend_for(reranked, ["i1", "i3"], k=4)
    assert cm3.similar_items(loaded, "i1", k=3) == cm3.similar_items(reranked, "i1", k=3)
    in_stock = [item for item, _ in cm3.recommend(loaded, "u3", k=30, only_items=["i5", "i2", "i40"])]
    assert set(in_stock) <= {"i5", "i2", "i40"} and "i40" in in_stock
    test = {"user": ["u3"], "item": ["i40"]}
    assert cm3.evaluate(loaded, test) == cm3.evaluate(reranked, test)
    replace(reranked, reranking=None).save(tmp_path)
    assert cm3.load(tmp_path).reranking is None and not (tmp_path / "reranking").exists()


def test_new_items_need_the_model_without_reranking(reranked: cm3.Recommender):
    features = {name: vectors[:1] for name, vectors in shop()[1].items()}
    with pytest.raises(ValueError, match=r"re-rank \(ease, itemknn-content\) have no scores of new items"):
        cm3.add_items(reranked, ["new"], features)
    assert "new" in cm3.add_items(replace(reranked, reranking=None), ["new"], features).item_ids


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"by": ["eese"]}, r"fit\.rerank\.by\.eese\.name = 'eese': no such model \(did you mean 'ease'"),
        ({"by": ["ease"], "of": "cm3"}, r"fit\.rerank\.of: remove it"),
        ({"by": ["ease"], "tops": 3}, r"fit\.rerank\.tops.*did you mean 'top'"),
        ({"by": ["ease"], "top": 3}, r"fit\.rerank\.top = 3: the monitored metric is recall@20"),
        ({"by": {"ease": {"l3": 1}}}, r"fit\.rerank\.by\.ease\.l3"),
        ({"by": {"ease": None}}, r"fit\.rerank\.by\.ease = None: write its settings as a mapping"),
        (
            {"by": {"cease": {"modality_weights": {"text": 1}}}},
            r"fit\.rerank\.by\.cease\.modality_weights: modality 'image' has no weight",
        ),
        ({"by": ["cm3"]}, r"'cm3' is given twice"),
        ({"by": ["rerank"]}, r"fit\.rerank\.by\.rerank"),
        ({}, r"fit\.rerank\.by"),
    ],
)
def test_faults_are_named(given: dict[str, Any], complaint: str):
    pairs, features, items = shop()
    with pytest.raises(UserError, match=complaint):
        cm3.fit(pairs, features, items, rerank=given)


def test_a_model_that_helps_and_cannot_be_computed_is_reported_before_a_long_training(monkeypatch: pytest.MonkeyPatch):
    pairs, features, items = shop()
    monkeypatch.setattr(fitting, "fit_network", lambda *_: pytest.fail("CM3 was trained first"))
    with pytest.raises(UserError, match=r"max_items = 5: cease"):
        cm3.fit(pairs, features, items, rerank={"by": {"cease": {"max_items": 5}}})
