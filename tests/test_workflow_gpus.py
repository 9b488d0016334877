"""Which jobs ask for a GPU: those that compute on one, and no others."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL, Checkout

from workflow.config import load_config
from workflow.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS: dict[str, Any] = {
    "modality": "caption", "backend": "openai-caption", "model": "any", "url": "http://127.0.0.1:9/v1", "encoder": "words",
}  # fmt: skip


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
def planned(tmp_path_factory: pytest.TempPathFactory) -> str:
    checkout = Checkout(tmp_path_factory.mktemp("gpus") / "shop", config())
    return checkout.run("-n", *(f"results/{name}/metrics.json" for name in ("shop", "mostpop", "ease")))


def test_the_rules_ask_for_what_the_plan_says(planned: str):
    asked: dict[str, set[str]] = {}
    for rule, block in re.findall(r"^rule (\w+):\n(.*?)\n\n", planned, re.MULTILINE | re.DOTALL):
        asked.setdefault(rule, set()).update(re.findall(r"\bgpu=(\d)", block) or ["none"])
    assert asked["similarity"] == asked["train"] - {"0"} == {"1"}
    assert asked["train"] == asked["extract"] == {"0", "1"}
    assert asked["train_item_weights"] == {"1"}
    assert {rule for rule, counts in asked.items() if counts == {"none"}} >= {"prepare", "split", "evaluate", "publish"}
