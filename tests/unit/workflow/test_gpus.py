"""Which jobs ask for a GPU: those that compute on one, and no others."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import SMALL, Checkout

from workflow.plan import features, runs
from workflow.plan.config import Config, load_config
from workflow.plan.resources import Needs

CAPTIONS: dict[str, Any] = {
    "modality": "caption",
    "backend": "openai-caption",
    "model": "any",
    "url": "http://127.0.0.1:9/v1",
    "encoder": "words",
}


def config(**training: Any) -> dict[str, Any]:
    """The small shop by all kinds of models."""
    whole = copy.deepcopy(SMALL)
    whole["extractors"]["captions"] = CAPTIONS
    whole["experiments"]["shop"]["training"] |= training
    for name in ("mostpop", "itemknn", "itemknn-content", "ease", "lightgcn"):
        whole["experiments"][name] = {"like": "shop", "model": {"name": name}}
    return whole


def checked(**training: Any) -> Config:
    return load_config(config(**training))


def test_a_model_asks_for_a_gpu_where_it_computes_on_one():
    asked = {name: runs.train_gpus(checked(), name) for name in checked().experiments}
    assert asked == {"shop": 1, "mostpop": 0, "itemknn": 0, "itemknn-content": 1, "ease": 1, "lightgcn": 1}
    assert not any(runs.train_gpus(checked(device="cpu"), name) for name in asked)


def test_a_training_may_take_a_share_of_a_gpu():
    asked = {name: runs.train_gpus(checked(gpu_share=0.25), name) for name in ("shop", "mostpop", "lightgcn")}
    assert asked == {"shop": 0.25, "mostpop": 0, "lightgcn": 0.25}
    assert runs.train_gpus(checked(gpu_share=0.25, processes=2), "shop") == 2
    keys = [runs.selected_run(checked(gpu_share=share), "shop") for share in (0.25, 1.0)]
    assert keys[0] == keys[1], "a share changes no result"


@pytest.mark.parametrize(("rows", "device", "percent"), [(100, "auto", 0), (200_000, "auto", 25), (200_000, "cpu", 0)])
def test_a_large_evaluation_takes_a_share_of_a_gpu(tmp_path, rows, device, percent):
    for name in ("users", "items"):
        pq.write_table(pa.table({"id": pa.array(range(rows))}), tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("users", "items")}
    wildcards = SimpleNamespace(experiment="shop")
    assert Needs(checked(device=device)).evaluation_gpu_percent(wildcards, files) == percent


def test_exact_search_asks_for_a_gpu_unless_all_its_readers_train_on_the_cpu():
    def asked(settings: Config, extractor: str, variant: str) -> int:
        return features.similarity_gpus(settings, "shop", extractor, variant)

    assert [asked(checked(), "words", variant) for variant in ("", "-mean", "-hnsw", "-ivf-mean")] == [1, 1, 0, 0]
    assert asked(checked(device="cpu"), "words", "") == 0
    # No experiment reads its graph: somebody asks for it by name.
    assert asked(checked(device="cpu"), "coarse", "") == 1


def test_captions_are_encoded_where_the_text_model_runs():
    assert (features.caption_gpus(checked(), "captions"), features.extract_gpus(checked(), "captions")) == (0, 1)
    assert (features.extract_gpus(checked(), "words"), features.extract_gpus(checked(), "looks")) == (1, 0)


@pytest.mark.parametrize(
    ("rows", "dim", "small"), [(1000, 384, True), (5000, 384, True), (6000, 384, False), (6000, 64, True)]
)
def test_small_searches_of_neighbours(tmp_path, rows, dim, small):
    path = tmp_path / "features.parquet"
    vectors = pa.FixedSizeListArray.from_arrays(pa.nulls(rows * dim, pa.float32()), dim)
    pq.write_table(pa.table({"embedding": vectors}), path)
    needs, wildcards = Needs(checked()), SimpleNamespace(dataset="shop")
    assert needs.is_small_search(wildcards, {"features": str(path)}) == small
    # Before the features are made, the counts that the configuration expects are used.
    assert needs.is_small_search(wildcards, {"features": str(tmp_path / "later.parquet")})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("gpus") / "shop", config())


def asked_by_rule(shop: Checkout, *options: str) -> dict[str, set[tuple[int, int]]]:
    """Which (GPUs, threads) the jobs of each rule ask for in a dry run."""
    targets = [f"results/{name}/metrics.json" for name in ("shop", "mostpop", "ease")]
    asked: dict[str, set[tuple[int, int]]] = {}
    for block in re.split(r"^rule ", shop.dry_run(*options, "--", *targets), flags=re.MULTILINE)[1:]:
        found = (re.search(rf"\b{pattern}(\d+)", block) for pattern in ("gpu=", "threads: "))
        gpus, threads = (int(match[1]) if match else None for match in found)
        asked.setdefault(block.partition(":")[0], set()).add((gpus or 0, threads or 1))
    return asked


@pytest.mark.integration
def test_the_rules_ask_for_what_the_plan_says(shop: Checkout):
    asked = asked_by_rule(shop, "--cores", "8")
    assert asked["similarity"] == asked["train_item_weights"] == {(1, 8)}
    assert asked["train"] == asked["extract"] == {(0, 8), (1, 8)}
    assert asked["prepare"] == {(0, 4)}
    assert all(asked[rule] == {(0, 1)} for rule in ("split", "publish"))


@pytest.mark.integration
def test_jobs_that_share_gpus_share_the_cores(shop: Checkout):
    asked = asked_by_rule(shop, "--cores", "8", "--resources", "gpu=2")
    assert asked["similarity"] == asked["train_item_weights"] == {(1, 4)}
    # What has no GPU goes by itself.
    assert asked["train"] == asked["extract"] == {(0, 8), (1, 4)}
    assert asked_by_rule(shop, "--cores", "2", "--resources", "gpu=4")["similarity"] == {(1, 1)}
