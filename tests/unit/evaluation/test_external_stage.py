"""The check of external lists and their evaluation, on files of a small shop."""

import csv
from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pyarrow.parquet as pq
import pytest
from golden import check_golden

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.interactions import read_interactions
from cm3.common.stages import STAGES
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.external_stage import check_lists

TABLES = ("interactions", "items", "users")


@pytest.fixture
def shop(tmp_path: Path) -> dict[str, Path]:
    paths = oracle.write_shop(tmp_path)
    data = read_interactions(*(paths[name] for name in TABLES))
    rng = np.random.default_rng(0)
    with (tmp_path / "lists.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "rank"])
        for user in data.user_ids:
            writer.writerows([user, item, rank] for rank, item in enumerate(rng.permutation(data.item_ids), 1))
        writer.writerow([data.user_ids[0], "nowhere", 10_000])
    return {name: paths[name] for name in TABLES} | {"lists": tmp_path / "lists.csv"}


def evaluated(shop: dict[str, Path], folder: Path) -> dict:
    return evaluate(
        **{name: shop[name] for name in TABLES},
        files={"external": folder / "model.json", "lists": shop["lists"]},
        settings=Evaluation(ks=[5, 20]),
        metrics_output=folder / "evaluation.json",
        per_user_output=folder / "per_user.parquet",
        recommendations_output=folder / "recommendations.parquet",
    )


def test_lists_are_scored_like_those_of_a_model(shop: dict[str, Path], tmp_path: Path):
    facts = check_lists(**shop, model={"name": "external"}, monitor="recall@20", output=tmp_path / "model.json")
    result = evaluated(shop, tmp_path)
    assert facts["best_valid"] == pytest.approx(result["valid"]["recall@20"], abs=1e-12)
    assert facts["lists"]["unknown_item_rows"] == result["lists"]["unknown_item_rows"] == 1
    data = read_interactions(*(shop[name] for name in TABLES))
    train, test = data.matrix("train"), data.truth("test")
    with shop["lists"].open() as file:
        rows = [row for row in csv.DictReader(file) if row["item"] in data.item_ids]
    recalls = []
    for user in np.flatnonzero(np.diff(test.indptr)):
        mine = [data.item_ids.index(row["item"]) for row in rows if row["user"] == data.user_ids[user]]
        first = [item for item in mine if item not in train[[user]].indices][:20]
        recalls.append(len(set(first) & set(test[[user]].indices)) / test[[user]].nnz)
    assert result["test"]["recall@20"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert result["test"].keys() == pq.read_table(tmp_path / "per_user.parquet").to_pydict().keys() - {"user", "n_test"}
    assert read_json(tmp_path / "model.json")["sha256"] == facts["lists_sha256"]


def test_a_file_that_changed_after_its_check_is_refused(shop: dict[str, Path], tmp_path: Path):
    check_lists(**shop, model={"name": "external"}, monitor="recall@20", output=tmp_path / "model.json")
    shop["lists"].write_text(shop["lists"].read_text() + "\n")
    with pytest.raises(UserError, match="has changed since it was checked"):
        evaluated(shop, tmp_path)


def test_the_stage_gives_its_golden_output(shop: dict[str, Path], tmp_path: Path):
    facts = check_lists(**shop, model={"name": "external"}, monitor="recall@20", output=tmp_path / "model.json")
    checked = {key: value for key, value in read_json(tmp_path / "model.json").items() if key != "sha256"}
    outputs = {"model": checked, "valid": facts["best_valid"], "recall": evaluated(shop, tmp_path)["test"]["recall@20"]}
    check_golden("external", STAGES["external"].version, outputs, tolerance=1e-9)
