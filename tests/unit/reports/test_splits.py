"""Comparisons over several random splits: means, intervals and tests cover splits and seeds."""

import copy
import csv

import numpy as np
import oracles_cm3 as oracle
import pyarrow.parquet as pq
import pytest
from scipy import stats
from study_runs import Shop, cell_spec, experiment_spec, one_thread, run  # noqa: F401

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.reports.analysis.findings import sentences
from cm3.reports.analysis.statistics import resampled_splits, split_noise
from cm3.reports.pages.study_page import study_page

SPLITS, SEEDS = (42, 43, 44), (1, 2)
QUALITY = {"good": 0.8, "poor": 0.5}


def on_other_split(shop: Shop, seed: int) -> Shop:
    """Return the shop with the labels of each user drawn again, in the same numbers."""
    rng = np.random.default_rng(seed)
    users, items, labels = (np.array(column) for column in zip(*shop.pairs, strict=True))
    for user in np.unique(users):
        labels[users == user] = rng.permutation(labels[users == user])
    found = copy.copy(shop)
    folder = shop.folder / str(seed)
    folder.mkdir()
    found.paths = oracle.write_interactions(folder, users, items, labels.astype(np.int8), shop.n_users, shop.n_items)
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    shop = Shop(folder)
    inputs, cells = dict(shop.paths), []
    for split in SPLITS:
        one = shop if split == SPLITS[0] else on_other_split(shop, split)
        if one is not shop:
            inputs[f"interactions-{split}"] = one.paths["interactions"]
        for name, quality in QUALITY.items():
            for seed in SEEDS:
                key = f"{len(cells):012x}"
                inputs |= one.cell(name, key, shop.vectors(quality, len(cells)))
                cells.append(cell_spec(name, key, seed) | {"split": split})
    spec = {
        "study": "repeated",
        "command": "snakemake results/repeated/comparison.json",
        "metrics": ["recall@10", "ndcg@10"],
        "cells": cells,
        "experiments": {name: experiment_spec(model) for name, model in zip(QUALITY, ("cm3", "bm3"), strict=True)},
        "resamples": 1000,
    }
    return spec, inputs, folder, run(spec, inputs, folder)


def values(study, name, metric):
    """Return (splits, seeds, users) values from the files."""
    spec, inputs, _, _ = study
    tables = {
        (c["split"], c["seed"]): pq.read_table(inputs[f"per_user.{name}.{c['run']}"])
        for c in spec["cells"]
        if c["experiment"] == name
    }
    return np.array([[tables[split, seed][metric].to_numpy() for seed in SEEDS] for split in SPLITS])


def test_means_are_over_splits_and_seeds(study):
    result = study[-1]
    assert result["settings"]["splits"] == list(SPLITS)
    for name, entry in result["experiments"].items():
        assert (entry["n_splits"], entry["n_seeds"]) == (3, 2)
        assert list(zip(entry["splits"], entry["seeds"], strict=True)) == [(s, k) for s in SPLITS for k in SEEDS]
        means = values(study, name, "recall@10").mean(-1)
        assert entry["metrics"]["recall@10"]["values"] == pytest.approx(means.ravel(), abs=1e-12)
        assert entry["metrics"]["recall@10"]["sd"] == pytest.approx(means.std(ddof=1), abs=1e-12)


def test_pairs_are_tested_by_user_and_their_splits_are_paired(study):
    result = study[-1]
    (pair,) = (row for row in result["pairs"] if row["metric"] == "recall@10")
    a, b = (values(study, name, "recall@10") for name in QUALITY)
    by_user = np.round(a.mean((0, 1)) - b.mean((0, 1)), 12)
    assert pair["difference"] == pytest.approx(by_user.mean(), abs=1e-12)
    assert pair["p"] == pytest.approx(stats.wilcoxon(by_user, zero_method="pratt").pvalue, rel=1e-6)
    by_split = (a - b).mean((1, 2))
    share = result["counts"]["test_interactions"] / result["counts"]["train_interactions"]
    reach = stats.t.ppf(0.975, 2) * by_split.std(ddof=1) * np.sqrt(1 / 3 + share)
    assert [pair["splits"][end] for end in ("low", "high")] == pytest.approx(
        [by_split.mean() - reach, by_split.mean() + reach], abs=1e-10
    )
    by_seed = (a - b).mean((0, 2))
    assert np.mean([pair["seeds"][end] for end in ("low", "high")]) == pytest.approx(by_seed.mean(), abs=1e-10)


def test_intervals_are_over_users_and_splits(study):
    result = study[-1]
    a = values(study, "good", "recall@10").mean(1)
    users = a.mean(0).std(ddof=1) / np.sqrt(a.shape[1])
    splits = a.mean(1).std(ddof=1) / np.sqrt(len(SPLITS))
    found = result["experiments"]["good"]["metrics"]["recall@10"]
    width = (found["high"] - found["low"]) / (2 * 1.96)
    assert users < width < 1.5 * np.sqrt(users**2 + splits**2) + users
    shares = resampled_splits(3, 20_000, 0)
    assert shares.sum(1) == pytest.approx(1) and shares.mean(0) == pytest.approx([1 / 3] * 3, abs=0.01)
    np.testing.assert_allclose(shares.var(0), (1 / 3) * (2 / 3) / 3, rtol=0.05)


def test_the_table_and_the_page_say_how_many_splits_and_seeds(study, tmp_path):
    folder = study[2]
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {(row["splits"], row["seeds"]) for row in rows} == {("3", "2")}
    assert {row["exceeds_split_noise"] for row in rows if row["against"]} <= {"True", "False"}
    study_page(comparison=folder / "comparison.json", page_output=tmp_path / "a.html", figures_output=tmp_path / "a")
    page = (tmp_path / "a.html").read_text()
    assert "3 random splits (seeds 42, 43, 44)" in page and "Between seeds, between splits" in page
    assert read_json(folder / "comparison.json")["cells"][0]["split"] == 42


def test_a_seed_that_is_missing_on_a_split_is_refused(study, tmp_path):
    spec, inputs, _, _ = study
    with pytest.raises(UserError, match="poor at the config's settings has seed 2 on 2 of 3 splits"):
        run(spec | {"cells": spec["cells"][:-1]}, inputs, tmp_path)


def test_splits_with_other_test_users_are_refused(study, tmp_path):
    spec, inputs, _, _ = study
    other = Shop(tmp_path / "fewer", n_users=110)
    changed = dict(inputs) | {"interactions-43": other.paths["interactions"]}
    with pytest.raises(UserError, match="test"):
        run(spec, changed, tmp_path)


def test_the_interval_of_splits_is_wider_than_that_of_independent_samples():
    a, b = [0.10, 0.12, 0.11, 0.13], [0.09, 0.10, 0.10, 0.11]
    plain = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = split_noise(a, b, 0.0, 0.95)
    assert (found["low"], found["high"]) == pytest.approx((plain.low, plain.high), abs=1e-12)
    wider = split_noise(a, b, 0.125, 0.95)
    assert wider["high"] - wider["low"] == pytest.approx((plain.high - plain.low) * np.sqrt(1 + 4 * 0.125), abs=1e-12)
    assert split_noise(a, a, 0.125, 0.95) == {"low": 0.0, "high": 0.0, "sd": 0.0, "exceeds": False}


def test_a_difference_within_the_variation_between_splits_is_said_so(study):
    result = study[-1]
    (pair,) = (row for row in result["pairs"] if row["metric"] == "recall@10")
    noisy = {"low": -0.01, "high": 0.05, "sd": 0.01, "exceeds": False}
    pairs = [pair | {"significant": True, "better": "a", "splits": noisy}]
    words = sentences(result["experiments"], pairs, "recall@10", 1)
    (word,) = (one for one in words if one["kind"] == "splits")
    assert "not beyond the variation between random splits: over splits the 95 % interval" in word["text"]
