"""The library without a workflow: fit on ids and arrays, recommend, similar items, save and load."""

import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch
from library_shop import QUICK, SMALL, shop

import cm3
from cm3.common.embeddings import write_embeddings
from cm3.common.errors import DamagedFileError
from cm3.library import features as library_features
from cm3.library import fitting, recommender
from cm3.similarity.exact import knn


@pytest.fixture(scope="module")
def trained() -> cm3.Recommender:
    pairs, features, items = shop()
    return cm3.fit(pairs, features, items, SMALL, QUICK)


@pytest.mark.parametrize("setting", [{"processes": 2}, {"warm_start": "old"}, {"select_on": "test"}])
def test_pipeline_settings_are_an_error(setting):
    with pytest.raises(ValueError, match="work in the pipeline only"):
        cm3.fit({"user": [1], "item": [1]}, {"text": np.ones((1, 2))}, [1], training=setting)


def test_the_examples_run():
    assert doctest.testmod(fitting).attempted >= 5
    assert not doctest.testmod(fitting).failed


def test_unseen_items_of_a_users_group_are_recommended(trained: cm3.Recommender):
    pairs, _, _ = shop()
    seen = {(u, i) for u, i in zip(pairs["user"], pairs["item"], strict=True)}
    users = [f"u{n}" for n in range(60)]
    lists = cm3.recommend(trained, users, k=5)
    right = 0
    for user, recommended in zip(users, lists, strict=True):
        assert len(recommended) == 5 and not any((user, item) in seen for item, _ in recommended)
        assert [score for _, score in recommended] == sorted((score for _, score in recommended), reverse=True)
        right += sum(int(item[1:]) % 2 == int(user[1:]) % 2 for item, _ in recommended)
    assert right > 0.9 * 300
    again = cm3.recommend(trained, ["u3"], k=100, exclude_seen=False)[0]
    assert len(again) == 41 and len(cm3.recommend(trained, ["u3"], k=100)[0]) == 33
    scores = trained.users[trained.user_ids.index("u3")] @ trained.items.T
    assert [item for item, _ in again] == [trained.item_ids[n] for n in np.argsort(-scores, kind="stable")]


def test_a_cold_item_is_recommended_by_its_features(trained: cm3.Recommender):
    lists = cm3.recommend(trained, trained.user_ids, k=41, exclude_seen=False)
    scores = {user: dict(one)["i40"] for user, one in zip(trained.user_ids, lists, strict=True)}
    own, other = ([score for user, score in scores.items() if int(user[1:]) % 2 == n] for n in (0, 1))
    assert min(own) > max(other)


def test_similar_items_are_of_the_same_group(trained: cm3.Recommender):
    for item, found in zip(("i0", "i1"), cm3.similar_items(trained, ["i0", "i1"], k=5), strict=True):
        assert item not in [name for name, _ in found]
        assert all(int(name[1:]) % 2 == int(item[1:]) % 2 and -1 <= cosine <= 1.000001 for name, cosine in found)


def test_fit_is_deterministic_and_models_are_saved(trained: cm3.Recommender, tmp_path: Path):
    pairs, features, items = shop()
    table = pa.table(pairs)
    again = cm3.fit(table, features, items, SMALL, QUICK)
    assert np.array_equal(again.users, trained.users) and np.array_equal(again.items, trained.items)
    trained.save(tmp_path / "model")
    loaded = cm3.load(tmp_path / "model")
    users = ["u5", "u6"]
    assert cm3.recommend(loaded, users, k=7) == cm3.recommend(trained, users, k=7)
    other = cm3.fit(pairs, features, items, SMALL, {**QUICK, "seed": 7})
    assert not np.array_equal(other.users, trained.users)


def test_missing_vectors_and_one_modality_are_enough():
    pairs, features, items = shop()
    features["text"][3] = np.nan
    fitted = cm3.fit(pairs, {"text": features["text"]}, items, SMALL, {**QUICK, "epochs": 2})
    assert np.isfinite(fitted.items).all() and len(fitted.history) == 2


def test_an_experiments_folder_is_loaded_with_seen_items(trained: cm3.Recommender, tmp_path: Path):
    results, prepared = tmp_path / "results/shop", tmp_path / "processed/data/interactions.parquet"
    write_embeddings(results / "user_embeddings.parquet", "user_id", trained.user_ids, trained.users, {})
    write_embeddings(results / "item_embeddings.parquet", "item_id", trained.item_ids, trained.items, {})
    assert cm3.load(results).seen is None
    with pytest.raises(ValueError, match="items that users have seen are not known"):
        cm3.recommend(cm3.load(results), ["u1"])
    (results / "metrics.json").write_text(json.dumps({"dataset": "data"}))
    assert trained.seen is not None
    coo = trained.seen.tocoo()
    users, items = ["a new user", *trained.user_ids], ["a new item", *trained.item_ids]  # which moves all others
    rows, columns = np.append(coo.row + 1, [0, 1]), np.append(coo.col + 1, [1, 0])
    (tmp_path / "processed/data").mkdir(parents=True)
    oracle.write_interactions(
        prepared.parent, rows, columns, np.zeros(len(rows), np.int8), len(users), len(items), users, items
    )
    assert cm3.recommend(cm3.load(results), ["u1"]) == cm3.recommend(trained, ["u1"])
    assert cm3.recommend(cm3.load(results, prepared), ["u2"]) == cm3.recommend(trained, ["u2"])


@pytest.mark.parametrize(
    ("metrics", "files", "complaint"),
    [
        ({"rerank": {"of": "base"}}, [], r"a re-ranking has lists of items and no model.*Load base, or .*cm3\.fit"),
        ({}, [], r"it has lists of items and no model; they are in recommendations\.parquet"),
        ({}, ["model.safetensors"], r"if its model has item weights, give interactions="),
    ],
)
def test_an_experiment_without_vectors_is_refused_with_the_way_out(tmp_path: Path, metrics, files, complaint: str):
    folder = tmp_path / "results/shop"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"dataset": "data", **metrics}))
    for name in files:
        (folder / name).touch()
    with pytest.raises(ValueError, match=complaint):
        cm3.load(folder)


def test_saving_without_seen_items_deletes_old_ones(trained: cm3.Recommender, tmp_path: Path):
    trained.save(tmp_path)
    replace(trained, seen=None).save(tmp_path)
    assert cm3.load(tmp_path).seen is None


@pytest.mark.parametrize("settings", [{"knn_missing": "mean"}, {"knn_method": "hnsw"}, {"knn_method": "ivf"}])
def test_the_neighbours_are_those_of_the_settings(settings, monkeypatch):
    if settings.get("knn_method") == "hnsw":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    pairs, features, items = shop()
    features["text"] = features["text"].copy()
    features["text"][:9] = np.nan
    graphs: list[sp.csr_matrix] = []
    found: list[str] = []
    made = fitting.item_item_matrix
    monkeypatch.setattr(fitting, "item_item_matrix", lambda *args: graphs.append(made(*args)) or graphs[-1])
    monkeypatch.setattr(library_features, "knn", lambda *args: found.append("exact") or knn(*args))
    cm3.fit(pairs, features, items, SMALL | settings, QUICK | {"epochs": 1})
    cm3.fit(pairs, features, items, SMALL, QUICK | {"epochs": 1})
    if "knn_missing" in settings:
        assert (graphs[0] != graphs[1]).nnz and len(found) == 4
    else:
        assert found == ["exact"] * 2


def test_inputs_that_do_not_fit_are_named(trained: cm3.Recommender, tmp_path: Path):
    pairs, features, items = shop()
    for call, complaint in (
        (lambda: cm3.recommend(trained, ["u100"]), r"user 'u100' is unknown \(did you mean 'u10'"),
        (lambda: cm3.similar_items(trained, ["x"]), "item 'x' is unknown"),
        (lambda: cm3.fit({"user": ["a"]}, features, items), "no column 'item'"),
        (lambda: cm3.fit(pairs, {"text": features["text"][:3]}, items), r"\(3, 6\) is not \(41, d\)"),
        (lambda: cm3.fit(pairs, {"text": torch.full((41, 6), 1e300, dtype=torch.float64)}, items), "beyond float32"),
        (lambda: cm3.fit(pairs, {}, items), "at least one modality"),
        (lambda: cm3.fit(pairs, features, items[:-2]), r"features\['text'\]|item 'i39' is unknown"),
        (lambda: cm3.fit(pairs, features, ["i0"] * 41), "duplicate item ids: 41 ids, 1 different"),
        (lambda: cm3.fit(pairs, features, items, {"knn": 3}), "unknown key"),
        (lambda: cm3.fit(pairs, features, items, valid_share=0.0), "holds out none of"),
        (lambda: cm3.load(tmp_path), "no such file"),
    ):
        with pytest.raises(Exception, match=complaint):
            call()


@pytest.mark.parametrize("name", [recommender.USERS, recommender.ITEMS, recommender.SEEN])
def test_a_damaged_file_of_a_saved_model_is_named(trained: cm3.Recommender, tmp_path: Path, name: str):
    trained.save(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    for place in (len(content) // 3, len(content) - 60):
        content[place] ^= 8
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=f"{name}: damaged"):
            cm3.load(tmp_path)
        content[place] ^= 8
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedFileError, match=f"{name}: damaged"):
        cm3.load(tmp_path)
