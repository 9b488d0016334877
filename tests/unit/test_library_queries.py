"""New items, histories, filters, metrics and baselines of the library, and what a saved model keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from library_shop import QUICK, SMALL, shop

import cm3
from cm3.common.errors import UserError
from cm3.library.features import reduce_features
from cm3.library.ids import id_columns, pair_matrix
from cm3.model.graph import item_item_matrix
from cm3.model.model import CM3
from cm3.similarity.exact import knn

CLOSED = {"mostpop", "itemknn", "itemknn-content", "ease", "cease", "mm-gf"}


@pytest.fixture(scope="module")
def trained() -> cm3.Recommender:
    pairs, features, items = shop()
    return cm3.fit(pairs, features, items, SMALL, QUICK)


def of_new_items(n: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {"text": rng.normal(size=(n, 6)), "image": rng.normal(size=(n, 5))}


@pytest.mark.parametrize("changed", [{}, {"n_mm_layers": 2}, {"item_graph": False}, {"knn_missing": "mean"}])
def test_a_new_item_gets_the_vector_of_a_cold_item_of_the_same_network(changed: dict[str, object], tmp_path: Path):
    pairs, features, items = shop()
    if "knn_missing" in changed:
        features["text"][4] = np.nan
    model = cm3.fit(pairs, features, items, SMALL | changed, {**QUICK, "epochs": 2})
    model.save(tmp_path)
    model = cm3.load(tmp_path)
    assert model.encoder is not None and model.seen is not None
    # The oracle: a network with one item more, with the same parameters, and the neighbours that the item would have.
    new = of_new_items(1)
    first = np.nan_to_num(features["text"], nan=0.0)
    first[4] = np.delete(features["text"], 4, 0).mean(0) if "knn_missing" in changed else first[4]
    whole = {"text": np.vstack([first, new["text"]]), "image": np.vstack([features["image"], new["image"]])}
    edges = []
    for x in whole.values():
        old, _ = knn(torch.from_numpy(x[:41].astype(np.float32)), 4)
        one, _ = knn(torch.from_numpy(x.astype(np.float32)), 4)
        near = torch.cat([old, one[41:]]).numpy()
        edges.append((np.repeat(np.arange(42), 4), near.ravel()))
    graph = item_item_matrix(edges, [0.9, 0.1], 42)
    users, bought = id_columns(pairs)
    rows = [model.user_rows[u] for u in users], [model.item_rows[i] for i in bought]
    seen = np.zeros((60, 42), np.float32)
    seen[rows] = 1
    given = [torch.from_numpy(x.astype(np.float32)) for x in whole.values()]
    network = CM3(given, pair_matrix(*np.nonzero(seen), (60, 42)), graph, model.encoder.settings)
    network.load_state_dict(dict(model.encoder.parameters), strict=False)
    with torch.no_grad():
        expected = network.embed().items[41].numpy()
        if network.settings.item_graph:
            # The neighbours' part comes from the trained users, which the encoder does not keep: compare the own part.
            expected = network.item_streams(torch.full((42,), 0.5))[0][41].numpy()
            row = graph[41].toarray()[0]
            found = expected.copy()
            for layer in model.encoder.layers:
                found = row[41] * found + row[:41] @ layer.numpy()
            expected = expected + found
    np.testing.assert_allclose(cm3.embed_items(model, new)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_layers_of_the_catalogue_give_its_vectors(trained: cm3.Recommender):
    _, features, _ = shop()
    assert trained.encoder is not None
    edges = [knn(torch.from_numpy(x.astype(np.float32)), 4)[0].numpy() for x in features.values()]
    graph = item_item_matrix([(np.repeat(np.arange(41), 4), near.ravel()) for near in edges], [0.9, 0.1], 41)
    layer = trained.encoder.layers[0].numpy()
    np.testing.assert_allclose(layer + graph @ layer, trained.items, rtol=1e-4, atol=1e-5)


def test_new_items_are_recommended_to_users_of_their_group(trained: cm3.Recommender):
    _, features, _ = shop()
    rng = np.random.default_rng(3)
    new = {"text": features["text"][[0, 1]] + 0.05 * rng.normal(size=(2, 6)), "image": rng.normal(size=(2, 5))}
    grown = cm3.add_items(trained, ["even", "odd"], new)
    assert grown.item_ids[-2:] == ["even", "odd"] and len(trained.item_ids) == 41
    lists = cm3.recommend(grown, grown.user_ids, k=43)
    for user, found in zip(grown.user_ids, lists, strict=True):
        scores = dict(found)
        own, other = ("even", "odd") if int(user[1:]) % 2 == 0 else ("odd", "even")
        assert scores[own] > scores[other]
    part = cm3.embed_items(trained, {"text": new["text"]})
    assert part.shape == (2, 24) and np.isfinite(part).all()


def test_reduced_features_train_as_those_reduced_beforehand_and_new_items_are_reduced_alike(tmp_path: Path):
    pairs, features, items = shop()
    features["image"][3] = np.nan
    quick, reduce = {**QUICK, "epochs": 2}, {"image": {"method": "pca", "dim": 3}}
    cm3.fit(pairs, features, items, SMALL, quick, reduce=reduce).save(tmp_path)
    model = cm3.load(tmp_path)
    narrow, projections = reduce_features(features, reduce, len(items))
    assert np.isnan(narrow["image"][3]).all() and narrow["image"].shape == (41, 3)
    beforehand = cm3.fit(pairs, narrow, items, SMALL, quick)
    np.testing.assert_array_equal(model.items, beforehand.items)
    new = of_new_items()
    vectors = cm3.embed_items(
        beforehand, {**new, "image": projections["image"].project(new["image"].astype(np.float32))}
    )
    np.testing.assert_allclose(cm3.embed_items(model, new), vectors, atol=1e-6)
    assert cm3.embed_items(model, {"text": new["text"]}).shape == vectors.shape
    with pytest.raises(ValueError, match=r"features\['image'\]: \(2, 3\) is not \(2, 5\)"):
        cm3.embed_items(model, {"image": np.ones((2, 3))})


@pytest.mark.parametrize(
    ("reduce", "complaint"),
    [
        ({"imge": {"method": "pca", "dim": 3}}, r"fit\.reduce\.imge: no such modality \(did you mean 'image'\?\)"),
        ({"image": {"method": "pca", "dims": 3}}, r"fit\.reduce\.image\.dims: unknown key \(did you mean 'dim'\?\)"),
        ({"image": {"method": "pca", "dim": 5}}, r"features\['image'\]: has vectors of 5 numbers.*give a dim below 5"),
    ],
)
def test_a_wrong_reduction_is_named(reduce: dict[str, object], complaint: str):
    with pytest.raises(UserError, match=complaint):
        reduce_features(of_new_items(20), reduce, 20)


def test_features_of_new_items_that_do_not_fit_are_named(trained: cm3.Recommender):
    new = of_new_items()
    for features, complaint in (
        ({"texts": new["text"]}, "the model has the modalities text, image, not texts"),
        ({}, "the model has the modalities text, image, not none"),
        ({"text": new["text"][:, :5]}, r"\(3, 5\) is not \(3, 6\)"),
        ({"text": new["text"] * np.nan}, "item 0 has no vector in any modality"),
    ):
        with pytest.raises(ValueError, match=complaint):
            cm3.embed_items(trained, features)
    for ids, complaint in (
        (["a", "b"], "2 ids and 3 rows"),
        (["a", "b", "i3"], "'i3' is an item of the model already"),
    ):
        with pytest.raises(ValueError, match=complaint):
            cm3.add_items(trained, ids, new)
    with pytest.raises(ValueError, match="duplicate item ids"):
        cm3.add_items(trained, ["a", "b", "a"], new)
    pairs, _, _ = shop()
    with pytest.raises(ValueError, match="cannot embed new items: only cm3"):
        cm3.embed_items(cm3.fit(pairs, model={"name": "mostpop"}), new)


def test_a_history_gets_items_of_its_group(trained: cm3.Recommender, tmp_path: Path):
    trained.save(tmp_path)
    for model in (trained, cm3.load(tmp_path)):
        found = cm3.recommend_for(model, ["i0", "i2", "i4"], k=5)
        assert len(found) == 5 and all(int(item[1:]) % 2 == 0 for item, _ in found)
        assert not {"i0", "i2", "i4"} & {item for item, _ in found}
        assert {"i0", "i2"} <= {item for item, _ in cm3.recommend_for(model, ["i0", "i2"], k=41, exclude_seen=False)}
    with pytest.raises(ValueError, match="history: has no items"):
        cm3.recommend_for(trained, [])
    with pytest.raises(ValueError, match=r"item 'i200' is unknown \(did you mean 'i20'"):
        cm3.recommend_for(trained, ["i1", "i200"])


def test_filters_limit_the_items(trained: cm3.Recommender):
    some = ["i1", "i3", "i40"]
    every = cm3.recommend(trained, ["u1", "u2"], k=41, exclude_seen=False)
    only = cm3.recommend(trained, ["u1", "u2"], k=41, exclude_seen=False, only_items=some)
    without = cm3.recommend(trained, ["u1", "u2"], k=41, exclude_seen=False, exclude_items=some)
    for whole, part, rest in zip(every, only, without, strict=True):
        assert part == [pair for pair in whole if pair[0] in some]
        assert rest == [pair for pair in whole if pair[0] not in some]
    assert cm3.recommend_for(trained, ["i5"], only_items=some, exclude_items=["i1"], k=9) == [
        pair for pair in cm3.recommend_for(trained, ["i5"], k=41) if pair[0] in ("i3", "i40")
    ]
    with pytest.raises(ValueError, match="item 'x' is unknown among 41 ids"):
        cm3.recommend(trained, "u1", only_items=["x"])


def test_metrics_of_a_test_set_are_those_of_per_user(trained: cm3.Recommender, caplog: pytest.LogCaptureFixture):
    test = {"user": ["u0", "u0", "u1", "stranger"], "item": ["i40", "unheard of", "i38", "i1"]}
    found = cm3.evaluate(trained, test, ks=[5, 30])
    truth = {"u0": {"i40", "unheard of"}, "u1": {"i38"}}
    for k in (5, 30):
        lists = {user: [item for item, _ in cm3.recommend(trained, user, k=30)][:k] for user in truth}
        if not {"i40", "i38"} & {item for items in cm3.recommend(trained, ["u0", "u1"], 41) for item, _ in items}:
            pytest.skip("both are seen")
        recalls = [len(truth[user] & set(lists[user])) / len(truth[user]) for user in truth]
        assert found[f"recall@{k}"] == pytest.approx(np.mean(recalls))
    assert "1 of 4 test interactions are of unknown users and left out, 1 of unknown items" in caplog.text
    seen = {"user": ["u0"], "item": [trained.item_ids[trained.seen[trained.user_rows["u0"]].indices[0]]]}  # type: ignore[index]
    assert cm3.evaluate(trained, seen)["recall@20"] == 1.0 and "metrics are too high" in caplog.text
    for wrong, complaint in (({"ks": [0]}, "between 1 and the 41 items"), ({"ks": [42]}, "between 1 and the 41 items")):
        with pytest.raises(ValueError, match=complaint):
            cm3.evaluate(trained, test, **wrong)
    with pytest.raises(ValueError, match="user 'nobody' is unknown"):
        cm3.evaluate(trained, {"user": ["nobody"], "item": ["i1"]})


@pytest.mark.parametrize("name", ["mostpop", "itemknn", "itemknn-content", "ease", "lightgcn", "vbpr"])
def test_a_baseline_is_fitted_saved_and_asked_like_cm3(name: str, tmp_path: Path):
    pairs, features, items = shop()
    settings = {"device": "cpu"} if name in CLOSED else {"device": "cpu", "epochs": 2}
    model = cm3.fit(pairs, features, items, {"name": name}, settings)
    model.save(tmp_path)
    loaded = cm3.load(tmp_path)
    users = ["u3", "u4"]
    assert cm3.recommend(loaded, users, k=6) == cm3.recommend(model, users, k=6)
    assert [len(one) for one in cm3.recommend(model, users, k=6)] == [6, 6]
    assert cm3.recommend_for(loaded, ["i1", "i3"], k=4) == cm3.recommend_for(model, ["i1", "i3"], k=4)
    assert cm3.similar_items(loaded, "i1", k=3) == cm3.similar_items(model, "i1", k=3)
    assert loaded.history == model.history and len(model.history) == (1 if name in CLOSED else 2)
    assert cm3.evaluate(loaded, {"user": ["u3"], "item": ["i40"]}) == cm3.evaluate(
        model, {"user": ["u3"], "item": ["i40"]}
    )
    if name in ("itemknn", "ease"):
        history = [item for user, item in zip(pairs["user"], pairs["item"], strict=True) if user == "u3"]
        assert cm3.recommend_for(model, history, k=6) == cm3.recommend(model, "u3", k=6)


def test_settings_of_a_baseline_are_checked():
    pairs, features, items = shop()
    with pytest.raises(Exception, match=r"fit\.model\.name = 'lightgnc': no such model \(did you mean 'lightgcn'"):
        cm3.fit(pairs, features, items, {"name": "lightgnc"})
    with pytest.raises(Exception, match=r"fit\.training\.precision: not supported by bpr-mf"):
        cm3.fit(pairs, features, items, {"name": "bpr-mf"}, {"precision": "bfloat16"})
    with pytest.raises(ValueError, match="item_ids: the ids of the rows of the features are needed"):
        cm3.fit(pairs, features)
    with pytest.raises(ValueError, match="at least one modality is needed by vbpr"):
        cm3.fit(pairs, model={"name": "vbpr"})


def test_the_history_of_training_is_saved(trained: cm3.Recommender, tmp_path: Path):
    trained.save(tmp_path)
    assert cm3.load(tmp_path).history == trained.history
    assert next(iter(trained.history[0])) == "epoch"


def test_an_unknown_id_is_not_answered_with_all_ids(trained: cm3.Recommender):
    with pytest.raises(ValueError, match=r"^user 'zzzzzzzz' is unknown among 60 ids; 2 unknown ids in all$"):
        cm3.recommend(trained, ["zzzzzzzz", "yyyyyyyyy"])
