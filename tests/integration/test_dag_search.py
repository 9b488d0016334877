"""A search from raw data: killed, continued, compared, with the lists of one of its runs as those of another tool."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from checkout import SMALL, Checkout, environment

PAGE = "results/found/comparison.html"


def config(*more: str) -> dict[str, Any]:
    whole = copy.deepcopy(SMALL)
    rate = {"training.lr": {"low": 0.0001, "high": 0.05, "log": True}}
    whole["experiments"]["lightgcn"] = {
        "dataset": "shop",
        "model": {"name": "lightgcn", "embedding_dim": 16},
        "training": {"epochs": 6, "batch_size": 128},
        "evaluation": {"ks": [5, 10]},
    }
    whole["experiments"]["other"] = {
        "dataset": "shop",
        "model": {"name": "external", "recommendations": "other.parquet"},
        "evaluation": {"ks": [5, 10]},
    }
    pruner = {"name": "median", "startup_trials": 1, "warmup_epochs": 1}
    search = {"trials": 4, "batch": 2, "spaces": {"lightgcn": rate}, "pruner": pruner}
    whole["studies"] = {"found": {"experiments": ["lightgcn", *more], "seeds": [1], "search": search}}
    return whole


def start(checkout: Checkout) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workflow.search", "found", "--cores", "2"],
        cwd=checkout.folder,
        env=environment(),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def searched(checkout: Checkout) -> list[dict[str, Any]]:
    process = start(checkout)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    trials = json.loads((checkout.folder / "results/found/search.json").read_text())["experiments"]["lightgcn"][
        "trials"
    ]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in trials]


def test_a_killed_search_goes_on_and_its_best_trial_is_compared(tmp_path: Path):
    checkout = Checkout(tmp_path / "killed", config())
    process = start(checkout)
    while process.poll() is None and not list(checkout.folder.glob("logs/lightgcn/train-*.log")):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trials = searched(checkout)
    assert len(trials) == 4 and {trial["state"] for trial in trials} <= {"complete", "pruned"}
    shutil.rmtree(checkout.folder / "results/found")
    assert searched(checkout) == trials, "the same search gives the same trials"

    best = max((t for t in trials if t["state"] == "complete"), key=lambda trial: trial["score"])
    checkout.run(f"results/lightgcn/runs/{best['run']}/evaluation.json")
    lists = checkout.folder / f"results/lightgcn/runs/{best['run']}/recommendations.parquet"
    shutil.copy(lists, checkout.folder / "other.parquet")
    checkout.configure(config("other"))
    assert "train" not in checkout.planned(PAGE)
    checkout.run(PAGE)
    found = json.loads((checkout.folder / "results/found/comparison.json").read_text())
    assert found["experiments"]["lightgcn"]["point"] == best["values"]
    for metric in found["metrics"]:
        ours, theirs = (found["experiments"][name]["metrics"][metric]["mean"] for name in ("lightgcn", "other"))
        assert ours == theirs
    page = (checkout.folder / PAGE).read_text()
    assert 'id="search"' in page and "training.lr" in page
    assert checkout.planned(PAGE) == {}
    (checkout.folder / "other.parquet").touch()
    assert checkout.planned(PAGE) == {}
