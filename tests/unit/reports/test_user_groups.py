"""Groups of users by a column in a comparison: means and gaps against plain loops, the csv and the page."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_runs import Shop, experiment_spec, make_study, one_thread, run  # noqa: F401

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.tables import USERS, write_table
from cm3.datasets.registry import parse_dataset
from cm3.datasets.user_groups import group_users
from cm3.reports.analysis.user_gap import chance_gaps, group_gaps
from cm3.reports.analysis.user_groups import compared_groups, read_user_groups
from cm3.reports.pages.study_page import study_page

N_USERS = 120
COUNTRY = [["DE", "FR", "<i>IT"][user % 3] if user % 30 else None for user in range(N_USERS)]
AGE = [20 + user // 3 for user in range(N_USERS)]
SMALL = ["big" if user < 80 else "small" if user < 90 else None for user in range(N_USERS)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    """The groups of all users of the shop, by the stage."""
    folder = tmp_path_factory.mktemp("groups")
    ids = [f"user{n}" for n in range(N_USERS)]
    write_table(
        folder / "users.parquet", pa.table({"user": pa.array(range(N_USERS), pa.int32()), "user_id": ids}), USERS
    )
    table = {"user_id": ids, "country": COUNTRY, "age": AGE, "size": SMALL, "alone": ["x"] * N_USERS}
    pq.write_table(pa.table(table), folder / "table.parquet")
    columns = {"groups": ["country", "age", "size", "alone"]}
    data = {
        "source": "files",
        "interactions": {"path": "a.csv"},
        "users": {"path": str(folder / "table.parquet"), "columns": columns},
    }
    spec = parse_dataset("mine", data, "datasets.mine")
    inputs = {name: Path(path) for name, path in spec.user_groups_inputs("mine").items()}
    group_users(spec.user_groups_spec(), inputs, folder / "users.parquet", folder / "user_groups.parquet")
    return folder / "user_groups.parquet"


@pytest.fixture(scope="module")
def study(tmp_path_factory, groups):
    """A comparison without the groups, and with them."""
    folder = tmp_path_factory.mktemp("study")
    shop = Shop(folder, n_users=N_USERS)
    plans = {
        "cm3": {"spec": experiment_spec("cm3"), "quality": 0.8},
        "ease": {"spec": experiment_spec("ease"), "quality": 0.4},
    }
    spec, inputs = make_study(shop, plans, seeds=(1, 2))
    (folder / "before").mkdir()
    before = run(spec, inputs, folder / "before")
    return inputs, before, folder, run(spec, inputs | {"user_groups": groups}, folder)


def expected_means(path: Path, metric: str) -> dict[str, tuple[int, float]]:
    """Number of test users and mean by group "column: value", from per_user.parquet."""
    found: dict[str, list[float]] = {}
    edges = [49, 39, 29]  # the 30th, 60th and 90th of 120 ages in order, the latest first
    for row in pq.read_table(path).to_pylist():
        user, value = row["user"], row[metric]
        age = AGE[user]
        quarter = next((n for n, edge in enumerate(edges) if age > edge), 3)
        age_name = ["over 49", "over 39 to 49", "over 29 to 39", "up to 29"][quarter]
        for name in (f"country: {COUNTRY[user] or 'unknown'}", f"age: {age_name}", f"size: {SMALL[user] or 'unknown'}"):
            found.setdefault(name, []).append(value)
    return {name: (len(values), sum(values) / len(values)) for name, values in found.items()}


@pytest.mark.parametrize("metric", ["recall@10", "ndcg@10", "recall@5"])
def test_means_and_gaps_of_groups_are_those_by_hand(study, metric: str):
    inputs, _, _, result = study
    for name, entry in result["experiments"].items():
        by_run = [expected_means(inputs[f"per_user.{name}.{key}"], metric) for key in entry["runs"]]
        slices = {f"{one['kind'].removeprefix('users by ')}: {one['name']}": one for one in result["slices"]}
        for group, (count, _) in by_run[0].items():
            assert slices[group]["users"] == count
            values = slices[group]["metrics"][name][metric]["values"]
            np.testing.assert_allclose(values, [means[group][1] for means in by_run], rtol=1e-9)
        for column in ("country", "age"):
            gaps = []
            for means in by_run:
                of_groups = [mean for group, (n, mean) in means.items() if group.startswith(f"{column}: ") and n >= 20]
                assert len(of_groups) >= 3
                gaps.append(max(of_groups) - min(of_groups))
            found = entry["beyond"][metric.replace("@", f"_gap_{column}@")]
            np.testing.assert_allclose(found["values"], gaps, rtol=1e-9)


def test_small_groups_and_unknown_users_are_shown_but_are_in_no_gap(study):
    _, _, _, result = study
    sizes = {one["name"]: one["users"] for one in result["slices"] if one["kind"] == "users by size"}
    assert list(sizes) == ["big", "small", "unknown"] and sizes["small"] == 10 and sizes["unknown"] == 30
    for entry in result["experiments"].values():
        assert not any("_gap_size" in name or "_gap_alone" in name for name in entry["beyond"])


def test_without_a_table_a_comparison_is_as_before(study):
    _, before, _, result = study
    assert {one["kind"] for one in before["slices"]} == {"items", "users"}
    assert [one for one in result["slices"] if one["kind"] in ("items", "users")] == before["slices"]
    for name, entry in before["experiments"].items():
        again = result["experiments"][name]
        assert entry["beyond"] == {key: again["beyond"][key] for key in entry["beyond"]}
        assert entry == again | {"beyond": entry["beyond"]}


def test_a_definition_says_how_the_column_is_cut(study):
    _, _, _, result = study
    found = {(one["kind"], one["name"]): one["definition"] for one in result["slices"]}
    assert found["users by country", "DE"] == "test users with country DE"
    assert found["users by country", "unknown"] == "test users whose country is not known"
    assert found["users by age", "over 29 to 39"] == (
        "test users with age over 29 to 39, cut at the quartiles of all users"
    )


def test_the_csv_has_groups_and_gaps(study):
    _, _, folder, result = study
    with (folder / "comparison.csv").open() as file:
        rows = {(row["experiment"], row["slice"], row["metric"]): row for row in csv.DictReader(file)}
    one = rows["cm3", "users by country: DE", "recall@10"]
    (expected,) = [s for s in result["slices"] if s["kind"] == "users by country" and s["name"] == "DE"]
    assert int(one["users"]) == expected["users"]
    assert float(one["mean"]) == expected["metrics"]["cm3"]["recall@10"]["mean"]
    gap = rows["ease", "all", "recall_gap_age@10"]
    assert float(gap["mean"]) == result["experiments"]["ease"]["beyond"]["recall_gap_age@10"]["mean"]


def test_the_page_has_a_table_of_each_column_with_its_gap(study, tmp_path: Path):
    _, _, folder, _ = study
    study_page(comparison=folder / "comparison.json", page_output=tmp_path / "a.html", figures_output=tmp_path / "a")
    text = (tmp_path / "a.html").read_text()
    tables = dict(re.findall(r"<table><caption>(.*?)</caption>(.*?)</table>", text, re.DOTALL))
    country = tables["Recall@10 by country of the users"]
    assert "&lt;i&gt;IT" in country and "<i>" not in country
    gap = read_json(folder / "comparison.json")["experiments"]["cm3"]["beyond"]["recall_gap_country@10"]["mean"]
    assert ">Gap<" in country and ">By chance up to<" in country and f"{gap:.4f}".lstrip("0") in country
    assert ">Gap<" not in tables["Recall@10 by size of the users"] and ">Gap<" not in tables["Recall@10 by users"]
    assert "without unknown users and groups of fewer than 20 test users" in text
    beyond = text[text.index('id="beyond"') : text.index('id="geometry"')]
    assert "Recall gap@10" in beyond and "gap country" not in beyond


def test_the_gap_is_the_largest_mean_minus_the_smallest():
    values = np.array([[1.0, 0], [0, 0], [0.5, 1], [0.5, 1], [0.25, 0.5]])
    masks = [np.array(mask, bool) for mask in ([1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1])]
    assert group_gaps(values, ["recall@5", "ndcg@10"], masks, "age") == {"recall_gap_age@5": 0.25, "ndcg_gap_age@10": 1}
    assert group_gaps(values, ["recall@5"], masks[:1], "age") == {}


def test_random_groups_have_a_smaller_gap_than_chance_gives_in_95_percent_of_draws():
    rng = np.random.default_rng(1)
    values = rng.random((300, 2)) < [0.1, 0.5]  # as hits: far from normal
    labels = np.repeat(np.arange(4), (30, 50, 100, 120))
    drawn = []
    for _ in range(2000):
        shuffled = rng.permutation(labels)
        means = np.stack([values[shuffled == group].mean(0) for group in range(4)])
        drawn.append(means.max(0) - means.min(0))
    found = chance_gaps(values, ["recall@5", "ndcg@10"], [labels == group for group in range(4)], "age")
    assert list(found) == ["recall_gap_age_chance@5", "ndcg_gap_age_chance@10"]
    shares = (np.array(drawn) < list(found.values())).mean(0)
    assert ((shares > 0.93) & (shares < 0.97)).all()
    assert chance_gaps(values, ["recall@5"], [labels == 0], "age") == {}


def test_groups_of_other_users_are_refused(groups: Path):
    found = read_user_groups(groups, np.arange(5), N_USERS)
    assert {group.column for group in found} == {"country", "age", "size", "alone"}
    assert all(group.mask.any() for group in found) and all(not masks for masks in compared_groups(found).values())
    with pytest.raises(UserError, match=r"user_groups\.parquet: has 120 users, the dataset 121; delete it"):
        read_user_groups(groups, np.arange(5), N_USERS + 1)
