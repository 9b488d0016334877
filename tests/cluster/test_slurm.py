"""The whole workflow on a real SLURM of one node, as in docs/cluster.md, with a job cancelled while it runs."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_node
from checkout import CHECKPOINT, Checkout
from repository import ROOT
from slurm_node import SlurmNode

METRICS = "results/shop/metrics.json"
THREADS = 2
PATIENCE_SECONDS = 3000

if (lacking := slurm_node.why_not()) is not None:
    pytest.skip(lacking, allow_module_level=True)


@pytest.fixture(scope="module")
def node() -> Iterator[SlurmNode]:
    with slurm_node.one_node() as cluster:
        yield cluster


@dataclass
class Campaign:
    """The record of one run of the whole sample.

    Attributes:
        checkout: where it ran.
        output: what Snakemake printed.
        jobs: by SLURM's id, the fields of `scontrol show job`, after all have ended.
        queued: cpus, memory, time limit, generic resources and state that `squeue` reported of training while it ran.
        cancelled: the id of the job that was cancelled.
    """

    checkout: Checkout
    output: str
    jobs: dict[str, dict[str, str]]
    queued: list[str]
    cancelled: str

    def of(self, *rules: str) -> list[dict[str, str]]:
        """Return the jobs that ran exactly these rules, in the order of submission."""
        marks = {f"rule_{name}_{'_'.join(rules)}" for name in ("data", "features", "figures")} | {f"rule_{rules[0]}"}
        return [job for job in self.jobs.values() if job["Comment"].partition("_wildcards_")[0] in marks]


def trainings(node: SlurmNode) -> list[dict[str, str]]:
    return [job for job in node.jobs().values() if job["Comment"].startswith("rule_train")]


@pytest.fixture(scope="module")
def campaign(node: SlurmNode, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Run the sample from nothing, and cancel training once it has written a checkpoint."""
    checkout = Checkout(tmp_path_factory.mktemp("slurm") / "shop")
    checkout.hold("checkpoint")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        "profiles/slurm",
        "--max-threads",
        str(THREADS),
        "--slurm-init-seconds-before-status-checks",
        "5",
        "--latency-wait",
        "20",
        METRICS,
    ]
    log = checkout.folder / "run.log"
    with log.open("w") as output:
        run = subprocess.Popen(
            command, cwd=checkout.folder, env=node.environment, text=True, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while not any(checkout.folder.glob(CHECKPOINT)):
            assert run.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        (training,) = trainings(node)
        queued = node.ask("squeue", "--noheader", f"--jobs={training['JobId']}", "--format=%C|%m|%l|%b|%T").strip()
        node.ask("scancel", training["JobId"])
        while len(trainings(node)) < 2:
            assert run.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        checkout.release()
        run.wait(PATIENCE_SECONDS)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, log.read_text()
    return Campaign(checkout, log.read_text(), node.jobs(), queued.split("|"), training["JobId"])


def test_the_sample_completes_despite_a_cancelled_job(campaign: Campaign):
    metrics = json.loads((campaign.checkout.folder / METRICS).read_text())
    assert 0 <= metrics["test"]["recall@10"] <= 1
    states = {job["JobId"]: job["JobState"] for job in campaign.jobs.values()}
    assert states.pop(campaign.cancelled) == "CANCELLED"
    assert set(states.values()) == {"COMPLETED"}


def test_short_jobs_are_grouped_and_long_ones_are_not(campaign: Campaign):
    assert len(campaign.of("generate", "prepare")) == 1
    assert len(campaign.of("split")) == 1
    assert len(campaign.of("images")) == 1
    assert len(campaign.of("extract", "similarity")) == 2
    assert len(campaign.of("train")) == 2
    assert len(campaign.of("evaluate", "publish")) == 1
    assert len(campaign.jobs) == 8


def test_training_resumes_with_more_memory_and_time(campaign: Campaign):
    first, second = campaign.of("train")
    assert (first["JobId"], second["JobState"]) == (campaign.cancelled, "COMPLETED")
    assert megabytes(second) == 2 * megabytes(first)
    assert minutes(second["TimeLimit"]) == 2 * minutes(first["TimeLimit"])
    (log,) = campaign.checkout.folder.glob("logs/shop/train-*.log")
    assert re.search(r"resuming from the checkpoint: epoch \d+", log.read_text())


def test_slurm_gets_the_requests_of_the_rules(campaign: Campaign):
    asked = {"mem_mb": [], "runtime": []}
    dry = campaign.checkout.dry_run("--forceall", METRICS)
    for block in dry.split("rule ")[1:]:
        if block.startswith("train:"):
            for name, values in asked.items():
                values += re.findall(rf"\b{name}=(\d+)", block)
    first, _ = campaign.of("train")
    assert ([str(megabytes(first))], [str(minutes(first["TimeLimit"]))]) == (asked["mem_mb"], asked["runtime"])
    assert campaign.queued[0] == str(THREADS) == first["NumCPUs"]
    assert campaign.queued[1] == f"{megabytes(first)}M"
    assert minutes(campaign.queued[2]) == minutes(first["TimeLimit"])
    assert campaign.queued[4] == "RUNNING"


def test_only_models_and_the_neighbour_search_request_a_gpu(campaign: Campaign):
    wanted = {job["JobId"] for job in campaign.jobs.values() if "gpu:1" in str(job)}
    # The descriptor needs none, but is in a group with the neighbour search among its vectors.
    assert wanted == {job["JobId"] for job in (*campaign.of("train"), *campaign.of("extract", "similarity"))}


def test_a_group_requests_summed_time_and_maximal_memory(campaign: Campaign):
    (group,) = campaign.of("generate", "prepare")
    # On a fresh data set: generate 2000 MB and 30 minutes, prepare 1500 and 15.
    assert megabytes(group) == 2000
    assert minutes(group["TimeLimit"]) == 30 + 15


def test_outputs_of_the_cluster_are_up_to_date_locally(campaign: Campaign):
    assert campaign.checkout.planned(METRICS) == {}


HOLD = """
import os, sys, time
from cm3.common.gpus import own_gpus
with own_gpus(1) as gpus:
    print("held", *gpus, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""


def test_a_stage_uses_the_gpu_that_slurm_allocated(node: SlurmNode, tmp_path: Path):
    (tmp_path / "hold.py").write_text(HOLD)
    command = f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/hold.py"
    held = {}
    for name, option in (("with", "--gpus=1"), ("without", "--gpus=0")):
        output = tmp_path / f"{name}.txt"
        node.ask("sbatch", "--wait", option, "--mem=100", f"--output={output}", f"--wrap={command}")
        held[name] = output.read_text().split()
    assert held["with"] == ["held", "0", "0"]
    # No GPU was allocated: none is used, whatever the machine has.
    assert held["without"][:1] == ["held"] and "0" not in held["without"]


def test_a_stopped_cluster_leaves_nothing_behind():
    with slurm_node.one_node() as other:
        other.ask("sbatch", "--mem=100", "--output=/dev/null", "--wrap=sleep 600")
        slurm_node.until(lambda: "RUNNING" in str(other.jobs()), 300)
        assert len(other.processes()) > 2
    assert other.processes() == [] and not other.folder.exists()


def megabytes(job: dict[str, str]) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([MG])", job["MinMemoryNode"]).groups()
    return round(float(number) * (1024 if unit == "G" else 1))


def minutes(limit: str) -> int:
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minute, _ = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minute
