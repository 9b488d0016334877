"""Exactly what has changed runs again, and nothing else: real snakemake runs and dry runs on a small shop."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import METRICS, SMALL, Checkout, changed

import cm3
from cm3.common.features import read_features
from cm3.common.files import read_json
from workflow.plan.migrate import DIGESTS, MARK

AFTER_IMAGE = {"extract": 1, "similarity": 1, "train": 1, "evaluate": 1, "publish": 1}


@pytest.fixture
def checkout(finished_checkout: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout that a test may change."""
    return finished_checkout.clone(tmp_path / "copy")


def test_nothing_changed_runs_nothing(checkout: Checkout):
    assert checkout.planned(METRICS) == {}


def test_touching_files_of_any_size_runs_nothing(checkout: Checkout):
    later = time.time() + 60
    for folder in ("raw", "processed", "results"):
        for path in (checkout.folder / folder).rglob("*"):
            os.utime(path, (later, later), follow_symlinks=False)
            later += 1
    assert checkout.planned(METRICS) == {}


@pytest.mark.parametrize("preserve_times", [True, False])
def test_a_fresh_checkout_beside_the_same_data_runs_nothing(checkout: Checkout, tmp_path: Path, preserve_times: bool):
    fresh = Checkout(tmp_path / "fresh", root=checkout.folder)
    copy_file = shutil.copy2 if preserve_times else shutil.copyfile
    for folder in ("results", "processed", "raw"):  # the worst order: what is made before what it is made from
        shutil.copytree(checkout.folder / folder, fresh.folder / folder, copy_function=copy_file, dirs_exist_ok=True)
    assert not (fresh.folder / ".snakemake").exists()
    assert fresh.planned(METRICS) == {}
    fresh.configure(changed(experiments__shop__evaluation={"ks": [3]}))
    assert fresh.planned(METRICS) == {"evaluate": 1, "publish": 1}


def test_the_order_of_keys_runs_nothing(checkout: Checkout):
    def reversed_keys(value: Any) -> Any:
        if isinstance(value, dict):
            keep = "text" in value  # the order of modalities is the order of fusion, and means something
            keys = list(value) if keep else reversed(value)
            return {key: reversed_keys(value[key]) for key in keys}
        return value

    checkout.configure(reversed_keys(SMALL))
    assert checkout.planned(METRICS) == {}


def test_a_new_experiment_or_extractor_nearby_runs_nothing(checkout: Checkout):
    config = changed(extractors__other={"modality": "image", "backend": "descriptor", "dtype": "float16"})
    config["experiments"]["second"] = {"dataset": "shop", "modalities": {"image": "other"}}
    checkout.configure(config)
    assert checkout.planned(METRICS) == {}


def test_equal_settings_under_two_names_are_trained_once(checkout: Checkout):
    config = changed(experiments__shop__training__epochs=5)
    config["experiments"] = {"first": {"like": "shop"}, **config["experiments"]}
    targets = (METRICS, "results/first/metrics.json")
    checkout.configure(config)
    assert checkout.planned(*targets) == {"train": 1, "evaluate": 2, "publish": 2}
    # What was trained under the second name stays there.
    del config["experiments"]["shop"]["training"]
    config["experiments"]["shop"] |= changed()["experiments"]["shop"]
    checkout.configure(config)
    assert checkout.planned(*targets) == {"evaluate": 1, "publish": 1}


def test_a_swapped_image_extractor_runs_the_image_side_only(checkout: Checkout):
    config = changed(experiments__shop__modalities={"text": "words", "image": "coarse"})
    checkout.configure(config)
    assert checkout.planned(METRICS) == AFTER_IMAGE
    before = (checkout.folder / METRICS).read_bytes()
    config["extractors"]["coarse"]["reduce"] = {"method": "pca", "dim": 16}
    checkout.configure(config)
    output = checkout.run(METRICS)
    assert "image coarse reduced to 16 numbers" in output
    found = read_json(checkout.folder / METRICS)
    assert (found["reduced"]["image"]["from"], found["reduced"]["image"]["dim"]) == (1101, 16)
    loaded = cm3.load(checkout.folder / "results/shop")
    twin = read_features(next((checkout.folder / "processed/shop/features/image").glob("coarse-????????????.parquet")))
    grown = cm3.add_items(loaded, ["twin"], {"image": twin.embedding[5:6]})
    assert grown.item_ids[-1] == "twin" and np.isfinite(grown.items[-1]).all()
    checkout.configure(SMALL)
    assert checkout.planned(METRICS) == {"publish": 1}
    checkout.run(METRICS)
    assert (checkout.folder / METRICS).read_bytes() == before
    assert checkout.planned(METRICS) == {}


def test_a_reduction_runs_no_extraction_and_the_item_graphs_of_its_modality_only(checkout: Checkout):
    after = {"reduce": 1, "similarity": 1, "train": 1, "evaluate": 1, "publish": 1}
    checkout.configure(changed(extractors__looks__reduce={"method": "pca", "dim": 16}))
    assert checkout.planned(METRICS) == after
    own = changed(experiments__shop__reduce={"image": {"method": "pca", "dim": 24}})
    own["experiments"]["shop"]["control"] = {"image": "gaussian"}
    checkout.configure(own)
    assert checkout.planned(METRICS) == after | {"control": 1}
    checkout.configure(changed(extractors__looks__reduce={"method": "pca", "dim": 80}))
    assert "vectors, too few for the 80 axes of reduce.dim = 80; give" in checkout.run("-n", METRICS, check=False)


def test_a_page_that_exists_is_made_again_with_its_results(checkout: Checkout):
    page = "results/shop/report.html"
    checkout.run(page)
    assert checkout.planned(METRICS) == {}
    checkout.configure(changed(experiments__shop__evaluation={"ks": [5, 15]}))
    assert checkout.planned(METRICS) == {"evaluate": 1, "publish": 1, "experiment_page": 1}
    checkout.run(METRICS)
    assert "Recall@15" in (checkout.folder / page).read_text()
    assert checkout.planned(METRICS) == checkout.planned(page) == {}


def test_a_text_extractor_setting_runs_only_the_text_side(checkout: Checkout):
    checkout.configure(changed(extractors__words__max_length=32))
    assert checkout.planned(METRICS) == AFTER_IMAGE


def test_batch_size_and_device_run_nothing(checkout: Checkout):
    checkout.configure(changed(extractors__words__batch_size=7, experiments__shop__training__device="cpu"))
    assert checkout.planned(METRICS) == {}


def test_a_training_knob_runs_train_onwards(checkout: Checkout):
    checkout.configure(changed(experiments__shop__training__lr=0.002))
    assert checkout.planned(METRICS) == {"train": 1, "evaluate": 1, "publish": 1}


def test_two_knobs_that_trade_values_run_train_onwards(checkout: Checkout):
    knobs = {"min_sim": 0.1, "max_sim": 0.9, "alpha": 0.5, "gamma": 0.7}
    checkout.configure(changed(experiments__shop__model={"embedding_dim": 16, **knobs}))
    checkout.run(METRICS)
    knobs["alpha"], knobs["gamma"] = knobs["gamma"], knobs["alpha"]
    checkout.configure(changed(experiments__shop__model={"embedding_dim": 16, **knobs}))
    assert checkout.planned(METRICS) == {"train": 1, "evaluate": 1, "publish": 1}


def test_a_list_of_cut_offs_runs_evaluate_onwards(checkout: Checkout):
    checkout.configure(changed(experiments__shop__evaluation={"ks": [5, 10, 15]}))
    assert checkout.planned(METRICS) == {"evaluate": 1, "publish": 1}


def test_knn_k_runs_the_graphs_onwards(checkout: Checkout):
    checkout.configure(changed(experiments__shop__model={"embedding_dim": 16, "knn_k": 5}))
    assert checkout.planned(METRICS) == {"similarity": 2, "train": 1, "evaluate": 1, "publish": 1}


def test_the_split_seed_runs_the_split_onwards(checkout: Checkout):
    checkout.configure(changed(datasets__shop__split={"seed": 9}))
    assert checkout.planned(METRICS) == {"split": 1, "train": 1, "evaluate": 1, "publish": 1}


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        ('"split": Stage("cm3.datasets.label", 1', 2, {"split": 1, "train": 1, "evaluate": 1, "publish": 1}),
        (
            '"similarity": Stage("cm3.similarity.stage", 1',
            2,
            {"similarity": 2, "train": 1, "evaluate": 1, "publish": 1},
        ),
        ('"train": Stage("cm3.training.train", 1', 2, {"train": 1, "evaluate": 1, "publish": 1}),
        ('"evaluate": Stage("cm3.evaluation.evaluate", 1', 2, {"evaluate": 1, "publish": 1}),
        ('"publish": Stage("workflow.publish", 1', 2, {"publish": 1}),
        ('"caption": Stage("extractors.caption.stage", 1', 2, {}),
        ('"train-baseline": Stage("cm3.baselines.train", 1', 2, {}),
    ],
)
def test_a_raised_version_runs_its_stage_onwards(checkout: Checkout, old: str, new: int, rules: dict[str, int]):
    checkout.edit("cm3/common/stages.py", old, f"{old[:-1]}{new}")
    assert checkout.planned(METRICS) == rules


def test_edited_code_commands_and_environments_run_nothing_under_the_same_version(checkout: Checkout):
    for package in ("cm3", "extractors", "workflow"):
        for path in (checkout.folder / package).rglob("*.py"):
            path.write_text(path.read_text() + "\n\nADDED = 1\n")
    for path in (checkout.folder / "workflow/rules").glob("*.smk"):
        path.write_text(path.read_text().replace("exec python -m", "exec  python -m"))
    with (checkout.folder / "environment.yml").open("a") as file:
        file.write("# a remark\n")
    assert checkout.planned(METRICS) == {}


def test_what_release_0_1_made_runs_nothing_unless_its_code_was_edited(checkout: Checkout):
    records = checkout.folder / "processed/.snakemake-metadata"
    (records / MARK).unlink()
    shutil.rmtree(checkout.folder / "processed/.checksums")  # which that release did not write
    digests = {version: digests[0] for version, digests in read_json(DIGESTS).items()}
    for path in records.rglob("*"):
        if path.is_file():
            record = read_json(path)
            identity, version = record["params"][0].strip("'").split(", version ")
            edited = record["rule"] == "split"
            record["params"] = [f"'{identity}, code {'f' * 16 if edited else digests[version]}'"]
            path.write_text(json.dumps(record | {"code": "exec python -m elsewhere"}))
    assert checkout.planned("processed/shop/items.parquet", "processed/shop/images/manifest.parquet") == {}
    assert checkout.planned(METRICS) == {"split": 1, "train": 1, "evaluate": 1, "publish": 1}


def test_pruning_deletes_what_nothing_uses_and_reruns_nothing(checkout: Checkout):
    def prune(*options: str) -> str:
        command = [sys.executable, "-m", "workflow.prune", *options]
        return subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, check=True).stdout

    assert "Nothing is unused under config/config.yaml" in prune("--delete")
    checkout.configure(changed(experiments__shop__modalities={"text": "words"}))
    listed = prune()
    assert "Nothing was deleted" in listed and "features/image/looks-" in listed and "results/shop/runs/" in listed
    checkout.configure(SMALL)
    assert checkout.planned(METRICS) == {}
    checkout.configure(changed(experiments__shop__modalities={"text": "words"}))
    assert prune("--delete").partition("\n")[2] == listed.partition("\n")[2].rpartition("\nNothing")[0] + "\n"
    assert not list((checkout.folder / "processed/shop/features/image").glob("looks-*"))
    assert checkout.planned(METRICS) == {"train": 1, "evaluate": 1, "publish": 1}
    # Published results stay; without them, what was deleted is made again.
    checkout.configure(SMALL)
    assert checkout.planned(METRICS) == {}
    (checkout.folder / METRICS).unlink()
    assert checkout.planned(METRICS) == AFTER_IMAGE
