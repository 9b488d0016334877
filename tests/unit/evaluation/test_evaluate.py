"""The evaluation stage against a ranking by sorting and metrics by set arithmetic."""

import subprocess
import sys

import numpy as np
import oracles_cm3 as oracle
import pyarrow.parquet as pq
import pytest

from cm3.common.embeddings import write_embeddings
from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.ranking import Ranking

USERS, ITEMS = 40, 30


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    paths = oracle.write_shop(folder, modalities=())
    rng = np.random.default_rng(5)
    paths["user_vectors"] = rng.standard_normal((USERS, 6)).astype(np.float32)
    paths["item_vectors"] = (rng.standard_normal((ITEMS, 6)) * rng.uniform(0.2, 3, (ITEMS, 1))).astype(np.float32)
    for kind, n in (("user", USERS), ("item", ITEMS)):
        path = paths[f"{kind}_embeddings"] = folder / f"{kind}_embeddings.parquet"
        write_embeddings(path, f"{kind}_id", [f"{kind}{i}" for i in range(n)], paths[f"{kind}_vectors"], {"epoch": 3})
    table = pq.read_table(paths["interactions"])
    labels = table.column("split").to_pylist()
    paths["by_split"] = {split: [set() for _ in range(USERS)] for split in ("train", "valid", "test")}
    for user, item, split in zip(table["user"].to_pylist(), table["item"].to_pylist(), labels, strict=True):
        paths["by_split"][split][user].add(item)
    return paths


def run(shop, folder, **settings):
    return evaluate(
        **{name: shop[name] for name in ("interactions", "items", "users")},
        files={name: shop[name] for name in ("user_embeddings", "item_embeddings")},
        settings=Evaluation(**{"ks": [3, 10]} | settings),
        metrics_output=folder / "evaluation.json",
        per_user_output=folder / "per_user.parquet",
        recommendations_output=folder / "recommendations.parquet",
    )


def lists(shop, score, mask, k):
    users, items = (shop[name].astype(np.float64) for name in ("user_vectors", "item_vectors"))
    scores = users @ items.T if score == "dot" else oracle.unit_rows(users) @ oracle.unit_rows(items).T
    hidden = [set.union(*(shop["by_split"][split][u] for split in mask.split("+"))) for u in range(USERS)]
    return [oracle.ranked(scores[u], hidden[u], k) for u in range(USERS)]


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("mask", ["train", "train+valid"])
def test_metrics_and_lists_match_the_definition(shop, tmp_path, score, mask):
    result = run(shop, tmp_path, score=score, mask=mask, top_n=5)
    assert read_json(tmp_path / "evaluation.json") == result
    best = lists(shop, score, mask, 10)
    truth = shop["by_split"]["test"]
    stored = pq.read_table(tmp_path / "per_user.parquet")
    assert stored["user"].to_pylist() == list(range(USERS))
    assert stored["n_test"].to_pylist() == [len(t) for t in truth]
    for k in (3, 10):
        values = [oracle.metrics_of(best[u], truth[u], k) for u in range(USERS)]
        for name in values[0]:
            expected = [v[name] for v in values]
            np.testing.assert_allclose(stored[f"{name}@{k}"].to_numpy(), expected, rtol=0, atol=1e-14)
            assert result["test"][f"{name}@{k}"] == pytest.approx(np.mean(expected), abs=1e-14)
    recommended = pq.read_table(tmp_path / "recommendations.parquet").to_pylist()
    assert [(r["user"], r["item"], r["rank"]) for r in recommended] == [
        (u, item, rank) for u in range(USERS) for rank, item in enumerate(best[u][:5], 1)
    ]
    scores = [r["score"] for r in recommended]
    assert all(
        a >= b
        for u in range(USERS)
        for a, b in zip(scores[5 * u : 5 * u + 4], scores[5 * u + 1 : 5 * u + 5], strict=True)
    )


def test_all_variants_and_validation_are_reported(shop, tmp_path):
    result = run(shop, tmp_path)
    for score in ("dot", "cosine"):
        for mask in ("train", "train+valid"):
            best = lists(shop, score, mask, 10)
            expected = np.mean(
                [oracle.metrics_of(best[u], shop["by_split"]["test"][u], 10)["ndcg"] for u in range(USERS)]
            )
            found = result["detail"]["test"][f"score {score}, mask {mask}"]["ndcg@10"]
            assert found == pytest.approx(expected, abs=1e-14)
    assert result["test"] == result["detail"]["test"]["score dot, mask train"]
    best = lists(shop, "dot", "train", 10)
    expected = np.mean([oracle.metrics_of(best[u], shop["by_split"]["valid"][u], 10)["map"] for u in range(USERS)])
    assert result["valid"]["map@10"] == pytest.approx(expected, abs=1e-14)
    assert result["best_epoch"] == 3


def test_cold_items_are_reported_apart(shop, tmp_path):
    (tmp_path / "data").mkdir()
    users = np.array([0, 0, 1, 1, 1, 2, 2])
    items = np.array([0, 1, 0, 2, 1, 0, 29])
    split = np.array([0, 2, 0, 2, 2, 0, 1], np.int8)  # items 1 and 2 are bought in the test split alone
    other = shop | oracle.write_interactions(tmp_path / "data", users, items, split, USERS, ITEMS)
    result = run(other, tmp_path)
    assert result["counts"] == {
        "users": USERS,
        "items": ITEMS,
        "test_users": 2,
        "valid_users": 1,
        "test_interactions": 3,
        "cold_items": ITEMS - 1,
        "cold_users": USERS - 3,
        "cold_test_users": 0,
        "test_interactions_seen_in_training": 0,
    }
    cold, warm = result["detail"]["items"]["cold"], result["detail"]["items"]["warm"]
    assert (cold["users"], cold["interactions"]) == (2, 3)
    assert warm == {"users": 0, "interactions": 0}
    assert cold["recall@10"] == result["test"]["recall@10"]


def test_lists_end_where_the_items_do(shop, tmp_path):
    run(shop, tmp_path, ks=[50], top_n=50)
    stored = pq.read_table(tmp_path / "recommendations.parquet").to_pylist()
    for u in range(USERS):
        mine = [r for r in stored if r["user"] == u]
        assert len(mine) == ITEMS - len(shop["by_split"]["train"][u])
        assert [r["rank"] for r in mine] == list(range(1, len(mine) + 1))


@pytest.mark.parametrize("mask", ["train", "train+valid"])
def test_parts_of_the_users_give_the_same_results(shop, tmp_path, monkeypatch, mask):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(shop, whole, mask=mask)
    monkeypatch.setattr("cm3.evaluation.evaluate.PART_USERS", 7)
    run(shop, parts, mask=mask)
    one, other = (pq.ParquetFile(folder / "recommendations.parquet") for folder in (whole, parts))
    assert one.num_row_groups == 1 and other.num_row_groups == -(-USERS // 7)
    one, other = one.read(), other.read()
    assert one.drop(["score"]).equals(other.drop(["score"]))
    # Rows of a block are padded so that sums round alike; another CPU may have kernels that still differ.
    np.testing.assert_allclose(one["score"].to_numpy(), other["score"].to_numpy(), rtol=1e-6, atol=1e-6)
    assert (parts / "per_user.parquet").read_bytes() == (whole / "per_user.parquet").read_bytes()
    (metrics,) = whole.glob("*.json")
    assert (parts / metrics.name).read_text() == metrics.read_text()


def test_users_with_similar_masks_are_ranked_together(shop, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(1)
    bought = [rng.permutation(ITEMS)[: 20 if user == 3 else 4] for user in range(USERS)]
    labels = [np.r_[0, 2, np.ones(len(items) - 2)] for items in bought]
    labels[5], labels[6] = np.array([0, 0, 1, 1]), np.array([0, 2, 2, 2])  # validation alone, and none
    users = np.repeat(np.arange(USERS), [len(items) for items in bought])
    tables = oracle.write_interactions(
        tmp_path / "data", users, np.concatenate(bought), np.concatenate(labels).astype(np.int8), USERS, ITEMS
    )
    asked = []

    class Spy(Ranking):
        def top_by(self, score, k):
            asked.append((len(self.users), k))
            return super().top_by(score, k)

    run(shop | tables, tmp_path, mask="train+valid")
    whole = [(tmp_path / name).read_bytes() for name in ("evaluation.json", "per_user.parquet")]
    monkeypatch.setattr("cm3.evaluation.evaluate.Ranking", Spy)
    for part in (1, 7, USERS):
        monkeypatch.setattr("cm3.evaluation.evaluate.PART_USERS", part)
        monkeypatch.setattr("cm3.evaluation.evaluate.LIST_ENTRIES", 600)
        asked.clear()
        run(shop | tables, tmp_path, mask="train+valid")
        assert [(tmp_path / name).read_bytes() for name in ("evaluation.json", "per_user.parquet")] == whole
        assert all(rows * length <= 600 or rows == 1 for rows, length in asked)
    assert {length for _, length in asked} == {50 + 2, 50 + 18, 10 + 2, 10 + 18}


def test_users_without_a_training_item_are_not_tested(shop, tmp_path):
    (tmp_path / "data").mkdir()
    users, items = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 3, 4, 5, 6])
    split = np.array([0, 1, 2, 1, 2, 0, 2], np.int8)
    result = run(shop | oracle.write_interactions(tmp_path / "data", users, items, split, USERS, ITEMS), tmp_path)
    assert result["counts"]["cold_test_users"] == 1
    assert (result["counts"]["test_users"], result["counts"]["valid_users"]) == (2, 1)
    assert pq.read_table(tmp_path / "per_user.parquet")["user"].to_pylist() == [0, 2]


def test_two_runs_write_the_same_bytes(shop, tmp_path):
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        run(shop, tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1] and len(written[0]) == 3


def test_embeddings_of_other_users_are_refused(shop, tmp_path):
    path = tmp_path / "users.parquet"
    write_embeddings(path, "user_id", [f"u{i}" for i in range(USERS)], shop["user_vectors"], {})
    with pytest.raises(UserError, match="its 40 ids are not those of the data set"):
        run(shop | {"user_embeddings": path}, tmp_path)


def test_embeddings_that_are_not_finite_are_refused(shop, tmp_path):
    vectors = shop["item_vectors"].copy()
    vectors[4, 1] = np.nan
    path = tmp_path / "items.parquet"
    write_embeddings(path, "item_id", [f"item{i}" for i in range(ITEMS)], vectors, {})
    with pytest.raises(UserError, match="item_id item4 holds NaN"):
        run(shop | {"item_embeddings": path}, tmp_path)


def test_an_empty_test_split_is_refused(shop, tmp_path):
    (tmp_path / "data").mkdir()
    other = oracle.write_interactions(
        tmp_path / "data", np.array([0, 1]), np.array([0, 1]), np.array([0, 1], np.int8), USERS, ITEMS
    )
    with pytest.raises(UserError, match="in the test split"):
        run(shop | other, tmp_path)


def test_the_settings_import_no_torch():
    code = "import sys, cm3, cm3.config; assert not {'torch', 'scipy', 'pyarrow'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_resolves_its_names_lazily():
    import cm3
    from cm3.model.fusion import slerp

    assert cm3.slerp is slerp and cm3.evaluation.metrics.per_user is cm3.per_user and set(cm3.__all__) == set(dir(cm3))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = cm3.absent


def test_the_other_score_can_be_left_out(shop, tmp_path):
    whole = run(shop, tmp_path, score="cosine")
    for also, names in (([], {"cosine"}), (["cosine"], {"cosine"}), (["dot"], {"cosine", "dot"})):
        some = run(shop, tmp_path, score="cosine", also_report=also)
        assert {way.split(",")[0].removeprefix("score ") for way in some["detail"]["test"]} == names
        assert some["detail"]["test"].items() <= whole["detail"]["test"].items() and some["test"] == whole["test"]
    assert "also_report" not in Evaluation().identity(), "the keys of earlier results"
    assert Evaluation(also_report=[]).identity()["also_report"] == []
