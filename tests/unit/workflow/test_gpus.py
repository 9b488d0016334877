"""Which jobs ask for a GPU: those that compute on one, and no others."""

import copy
import re
from typing import Any

import pytest
from checkout import SMALL, Checkout
from repository import ROOT

from workflow.plan.config import load_config
from workflow.plan.runs import Plan

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
    whole["extractors"]["told"] = CAPTIONS
    whole["experiments"]["shop"]["training"] |= training
    for name in ("mostpop", "itemknn", "itemknn-content", "ease", "lightgcn"):
        whole["experiments"][name] = {"like": "shop", "model": {"name": name}}
    return whole


def plan(**training: Any) -> Plan:
    return Plan(load_config(config(**training)), ROOT)


def test_a_model_asks_for_a_gpu_where_it_computes_on_one():
    told = {name: plan().train_gpus(name) for name in plan().config.experiments}
    assert told == {"shop": 1, "mostpop": 0, "itemknn": 0, "itemknn-content": 1, "ease": 1, "lightgcn": 1}
    assert not any(plan(device="cpu").train_gpus(name) for name in told)


def test_neighbours_are_found_on_a_gpu_unless_faiss_finds_them_or_all_who_read_them_train_on_the_processor():
    asked = plan().similarity_gpus
    assert [asked("shop", "words", variant) for variant in ("", "-mean", "-hnsw", "-ivf-mean")] == [1, 1, 0, 0]
    assert plan(device="cpu").similarity_gpus("shop", "words", "") == 0
    # No experiment reads its graph: somebody asks for it by name.
    assert plan(device="cpu").similarity_gpus("shop", "coarse", "") == 1


def test_captions_are_encoded_where_the_text_model_runs():
    assert (plan().caption_gpus("told"), plan().extract_gpus("told")) == (0, 1)
    assert (plan().extract_gpus("words"), plan().extract_gpus("looks")) == (1, 0)


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
    assert all(asked[rule] == {(0, 1)} for rule in ("prepare", "split", "publish"))


@pytest.mark.integration
def test_jobs_that_share_gpus_share_the_cores(shop: Checkout):
    asked = asked_by_rule(shop, "--cores", "8", "--resources", "gpu=2")
    assert asked["similarity"] == asked["train_item_weights"] == {(1, 4)}
    # What has no GPU goes by itself.
    assert asked["train"] == asked["extract"] == {(0, 8), (1, 4)}
    assert asked_by_rule(shop, "--cores", "2", "--resources", "gpu=4")["similarity"] == {(1, 1)}
