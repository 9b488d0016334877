"""Intra-list diversity and the gap between user groups, against their formulas in plain loops."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from study_runs import Shop, experiment_spec, make_study, run

from cm3.common.features import write_features
from cm3.reports.analysis import diversity
from cm3.reports.analysis.diversity import intra_list_diversity, read_unit_vectors
from cm3.reports.analysis.user_gap import activity_groups, group_gaps

LISTS = np.array([[2, 4, 1, 0], [0, 3, -1, -1], [3, 5, -1, -1], [5, 0, 3, 1], [-1, -1, -1, -1]])
STATUS = ["ok", "ok", "ok", "missing", "ok", "ok"]


@pytest.fixture
def vectors(tmp_path) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32) * 3
    ids = [f"item{n}" for n in range(6)]
    write_features(tmp_path / "features.parquet", ids, x, STATUS, {})
    return read_unit_vectors(tmp_path / "features.parquet", ids)


def expected(lists: np.ndarray, x: np.ndarray, k: int) -> float:
    values = []
    for row in lists:
        items = [item for item in row[:k] if item >= 0 and STATUS[item] == "ok"]
        pairs = list(itertools.combinations(items, 2))
        if pairs:
            cosines = [x[a] @ x[b] / np.linalg.norm(x[a]) / np.linalg.norm(x[b]) for a, b in pairs]
            values.append(sum(1 - cosine for cosine in cosines) / len(pairs))
    return sum(values) / len(values)


@pytest.mark.parametrize("entries", [1, 10, 10_000])
def test_diversity_is_the_mean_distance_of_pairs(vectors: np.ndarray, monkeypatch, entries: int):
    monkeypatch.setattr(diversity, "BLOCK_ENTRIES", entries)
    found = intra_list_diversity(LISTS, {"text": vectors}, [2, 4, 9])
    assert set(found) == {"diversity_text@2", "diversity_text@4"}
    for k in (2, 4):
        assert found[f"diversity_text@{k}"] == pytest.approx(expected(LISTS, vectors, k), rel=1e-6)


def test_equal_items_have_no_diversity_and_opposite_ones_two():
    x = np.array([[1, 0], [1, 0], [-1, 0]], np.float32)
    assert intra_list_diversity(np.array([[0, 1]]), {"m": x}, [2]) == {"diversity_m@2": 0.0}
    assert intra_list_diversity(np.array([[0, 2]]), {"m": x}, [2]) == {"diversity_m@2": 2.0}
    assert intra_list_diversity(np.array([[0, -1]]), {"m": x}, [2]) == {"diversity_m@2": 0.0}
    assert intra_list_diversity(np.array([[0, 2]]), {}, [2]) == {}


def test_the_gap_is_between_the_best_and_the_worst_served_third():
    lengths = np.array([1, 9, 2, 3, 3, 3, 8, 1, 2])
    values = np.random.default_rng(2).random((9, 2))
    ordered = sorted(set(lengths.tolist()))
    # A third ends at the shortest history that at least a third, or two thirds, of the users do not exceed.
    ends = [min(n for n in ordered if 3 * (lengths <= n).sum() >= share * 9) for share in (1, 2, 3)]
    thirds = [
        [user for user in range(9) if low < lengths[user] <= high] for low, high in zip([0, *ends], ends, strict=False)
    ]
    assert [len(third) for third in thirds] == [4, 3, 2]
    groups = activity_groups(lengths)
    assert [np.flatnonzero(mask).tolist() for mask in groups] == thirds
    found = group_gaps(values, ["recall@10", "ndcg@20"], groups)
    for column, name in enumerate(("recall_gap@10", "ndcg_gap@20")):
        means = [sum(values[user, column] for user in third) / len(third) for third in thirds]
        assert found[name] == pytest.approx(max(means) - min(means), rel=1e-12)


def test_users_of_equal_history_are_one_group_and_have_no_gap():
    groups = activity_groups(np.array([4, 4, 4]))
    assert len(groups) == 1 and group_gaps(np.ones((3, 1)), ["recall@10"], groups) == {}


def test_a_comparison_measures_all_models_by_the_same_features(tmp_path):
    shop = Shop(tmp_path)
    spec, inputs = make_study(shop, {name: {"spec": experiment_spec(name), "quality": 0.6} for name in ("cm3", "ease")})
    assert not any(name.startswith("diversity") for name in run(spec, inputs, tmp_path)["experiments"]["cm3"]["beyond"])
    ids = [f"item{n}" for n in range(shop.n_items)]
    path = tmp_path / "features.parquet"
    write_features(path, ids, shop.kind.astype(np.float32), ["ok"] * shop.n_items, {})
    result = run(spec, inputs | {"features.text": path}, tmp_path)
    unit = shop.kind / np.linalg.norm(shop.kind, axis=1, keepdims=True)
    for name, entry in result["experiments"].items():
        rows = pq.read_table(inputs[f"recommendations.{name}.{entry['runs'][0]}"]).to_pylist()
        lists: dict[int, list[int]] = {}
        for row in rows:
            if row["rank"] <= 10:
                lists.setdefault(row["user"], []).append(row["item"])
        distances = [
            np.mean([1 - unit[a] @ unit[b] for a, b in itertools.combinations(items, 2)]) for items in lists.values()
        ]
        assert entry["beyond"]["diversity_text@10"]["values"][0] == pytest.approx(np.mean(distances), rel=1e-5)
        assert entry["beyond"]["recall_gap@10"]["mean"] > 0
