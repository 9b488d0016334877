"""A run killed with SIGKILL, and the same command again: it completes, with the same results to the byte."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from checkout import METRICS, Checkout

STAGES = ("generate", "prepare", "split", "images", "extract", "similarity", "train", "evaluate", "publish")


def test_killed_in_every_stage_the_results_are_identical(finished_checkout: Checkout, tmp_path: Path):
    whole, killed = finished_checkout, Checkout(tmp_path / "killed")
    left = set(STAGES)
    while (stage := killed.kill_in(left, METRICS)) is not None:
        left.remove(stage)
    assert not left, f"never killed in {left}"
    killed.run(METRICS)

    for name in ("per_user.parquet", "recommendations.parquet", "item_embeddings.parquet"):
        ours, theirs = (pq.read_table(c.folder / "results/shop" / name) for c in (killed, whole))
        assert ours.equals(theirs), name
    ours, theirs = (json.loads((c.folder / METRICS).read_text()) for c in (killed, whole))
    for section in ("test", "valid", "coverage", "config", "keys", "data"):
        assert ours[section] == theirs[section], section
    leftovers = [p for p in killed.folder.rglob("*.part") if "logs" not in p.parts]
    assert leftovers == [] or all(p.name.startswith(".") for p in leftovers)
