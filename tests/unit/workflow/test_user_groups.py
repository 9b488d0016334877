"""Groups of users in the plan: their own small task; no key of tables, models or evaluations depends on them."""

from typing import Any

import pytest
from study_config import config

from cm3.common.errors import UserError
from workflow.plan import comparison, data, pages, publish, runs
from workflow.plan.config import Config, load_config

TABLE = {"path": "shop/people.csv", "columns": {"user_id": "customer", "groups": ["age", "country"]}}
SETTINGS = {
    "run": "13a20f919aba",
    "prepare": "de877310eaa6",
    "split": "72bae4977cc6",
    "images": "7eb51332eb79",
    "train": "a2808cea45a2",
    "evaluate": "3fbd6747c44b",
    "publish": "dd8e56359ee5",
    "compare": "883debcfa3bf",
    "study_runs": "883debcfa3bf",
}
"""Keys of the settings for a dataset without a users' table, from before there were such tables."""


def shop(users: dict[str, Any] | None = None) -> Config:
    whole = config({"experiments": ["mine"], "seeds": [1]})
    whole["datasets"]["mine"] = {
        "source": "files",
        "interactions": {"path": "shop/pairs.csv"},
        "items": {"path": "shop/items.jsonl", "columns": {"title": "name"}},
        **({"users": users} if users else {}),
    }
    whole["experiments"]["mine"] = {**whole["experiments"]["ease"], "like": "shop", "dataset": "mine"}
    return load_config(whole)


def keys(settings: Config) -> dict[str, str]:
    run = runs.selected_run(settings, "mine")
    tasks = {
        "prepare": data.prepare(settings, "mine"),
        "split": data.split(settings, "mine"),
        "images": data.images(settings, "mine"),
        "train": runs.train(settings, "mine", run),
        "evaluate": runs.evaluate(settings, "mine", run),
        "publish": publish.publish(settings, "mine"),
        "compare": comparison.compare(settings, "compared"),
        "study_runs": comparison.study_runs(settings, "compared"),
    }
    return {"run": run, **{name: task.settings for name, task in tasks.items()}}


def inputs(settings: Config) -> dict[str, dict[str, str]]:
    run = runs.selected_run(settings, "mine")
    return {
        "train": runs.train_inputs(settings, "mine", run),
        "evaluate": runs.evaluate_inputs(settings, "mine", run),
        "publish": publish.publish_inputs(settings, "mine"),
        "page": pages.experiment_page_inputs(settings, "mine"),
        "compare": comparison.compare_inputs(settings, "compared"),
    }


def test_the_keys_of_everything_else_are_those_without_a_table():
    assert keys(shop()) == SETTINGS
    assert keys(shop(TABLE)) == SETTINGS


def test_only_the_comparison_reads_the_groups():
    without, named = inputs(shop()), inputs(shop(TABLE))
    groups = {"user_groups": "processed/mine/user_groups.parquet"}
    assert named.pop("compare") == without.pop("compare") | groups
    assert named == without


def test_the_groups_depend_on_the_columns_and_the_prepared_users():
    before = data.user_groups(shop(TABLE), "mine")
    assert before.spec == {"source": "files", "format": "csv", "columns": TABLE["columns"]}
    other = data.user_groups(shop({**TABLE, "path": "elsewhere/people.csv"}), "mine")
    assert other.identity == before.identity
    fewer = data.user_groups(shop({**TABLE, "columns": {**TABLE["columns"], "groups": "age"}}), "mine")
    assert fewer.identity != before.identity
    assert before.made_from == data.prepare(shop(), "mine").made_from | {"user-groups": before.settings}
    expected = data.expected_settings(shop(TABLE), inputs(shop(TABLE))["compare"])
    assert expected["user_groups"] == before.made_from


def test_a_missing_table_is_named_with_its_key(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"datasets\.mine\.users\.path = 'shop/people.csv': no such file"):
        data.user_groups_inputs(shop(TABLE), "mine")
    with pytest.raises(
        UserError, match=r"datasets\.mine: names no columns of users to compare; .*users\.columns\.groups"
    ):
        data.user_groups_inputs(shop(), "mine")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/people.csv").write_text("customer,age\n")
    assert data.user_groups_inputs(shop(TABLE), "mine") == {
        "user_table": "shop/people.csv",
        "users": "processed/mine/users.parquet",
    }
