"""Checks of training: a step against its floor and as a CUDA graph, metrics against the CPU's, kill and resume, shares."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from fake_graph import fake_cuda_graphs
from measure import DEVICE, TINY, Found, seconds
from torch import Tensor
from training import Opponent
from training_shop import history, prepared, run, stage_command

from cm3.config import Model, Training
from cm3.evaluation.ranking import Validation
from cm3.model.model import build_model
from cm3.model.sampling import Batch, Sampler
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.cuda_graph import GraphedStep
from cm3.training.loop import TrainingRun

# Users, items and training pairs of Amazon Baby; wide and narrow image features.
USERS, ITEMS, PAIRS, WIDTHS = (200, 100, 2_000, (16, 32)) if TINY else (19_445, 7_050, 118_551, (512, 4096))
BATCH, STEPS = (256, 3) if TINY else (2048, 20)
SEEDS = (1, 2) if TINY else (1, 2, 3)
SHARES = 2 if TINY else 4
SHOP = {"n_users": 60, "n_items": 40} if TINY else {"n_users": 3000, "n_items": 1500}
START_SECONDS = 60  # of a process and its first checkpoint


def step(width: int, precision: str) -> Found:
    """Steps on random data against CM3 written plainly, and the products of features alone."""
    ours, data = _run(width, precision)
    batches = list(ours.sampler.epoch(1))
    plain = Opponent(data.features, data.train, data.graph).to(DEVICE)
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3)
    batch = batches[0]

    def our_step() -> None:
        ours.step([batch])

    def their_step() -> None:
        optimiser.zero_grad()
        t = torch.rand(ITEMS, device=DEVICE)
        plain.loss(t, batch.users, batch.items, batch.negatives).backward()
        optimiser.step()

    weights = [torch.randn(320, x.shape[1], device=DEVICE) for x in data.features]

    def floor() -> None:
        for x, weight in zip(data.features, weights, strict=True):
            (x @ weight.T).T @ x

    for work in (our_step, their_step, floor):
        work()
    found = [seconds(work, STEPS) for work in (our_step, their_step, floor)]
    epoch_draws = seconds(lambda: list(ours.sampler.epoch(2)))
    embeddings = ours.model.embed()
    validated = seconds(lambda: ours.validation.score(embeddings.users, embeddings.items))
    epoch = found[0] * len(batches) + epoch_draws + validated
    return (
        f"{1e3 * found[0]:.1f} ms; epoch with validation {epoch:.2f} s",
        f"written plainly {1e3 * found[1]:.1f} ms; products of features alone {1e3 * found[2]:.1f} ms",
    )


def graphed_step(width: int) -> Found:
    """Steps as a CUDA graph against the same steps without it; on the CPU by a graph that is recorded there."""
    plain, graphed = _run(width)[0], _run(width, cuda_graph=True)[0]
    with fake_cuda_graphs() if TINY else contextlib.nullcontext():
        graphed.capture_due = True
        batches = [[batch] for batch in plain.sampler.epoch(1)][: STEPS + 1]
        times, losses = zip(*(_steps(one, batches) for one in (graphed, plain)), strict=True)
        if not isinstance(graphed.static_step, GraphedStep):
            raise RuntimeError("no graph was captured")
    gap = float(((losses[0] - losses[1]) / losses[1]).abs().max())
    return (
        f"{1e3 * times[0]:.1f} ms",
        f"without {1e3 * times[1]:.1f} ms; largest relative difference of losses, components and norms {gap:.1e}",
    )


def same_metrics() -> Found:
    """A small shop trained on the device and on the CPU, with several seeds."""
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shop = prepared(Path(folder), n_users=200, n_items=80)
        for device in dict.fromkeys((DEVICE.type, "cpu")):
            for seed in SEEDS:
                settings = {"device": device, "seed": seed, "epochs": 5, "monitor": "recall@10"}
                found = run(shop, Path(folder) / f"{device}-{seed}", training=settings)
                best.setdefault(device, []).append(found["best_valid"])
    ours, cpu = np.array(best[DEVICE.type]), np.array(best["cpu"])
    return (
        f"{ours.mean():.4f} on {DEVICE.type}, {cpu.mean():.4f} on cpu",
        f"deviation between seeds {cpu.std(ddof=1):.4f}, largest difference of a seed {np.abs(ours - cpu).max():.4f}",
    )


def killed_and_resumed() -> Found:
    """A training that is killed after its first checkpoint and started again, against one that ran through."""
    training = {"epochs": 20, "patience": 20, "checkpoint_seconds": 0.0, "device": DEVICE.type}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shop = prepared(folder, **SHOP)
        command = stage_command(shop, folder / "killed", training, {"threads": 1})
        checkpoint = folder / "killed/checkpoints/last.safetensors"
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + START_SECONDS
        while process.poll() is None and not checkpoint.exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = subprocess.run(command, capture_output=True, text=True, check=False)
        if resumed.returncode or "resuming from the checkpoint" not in resumed.stderr:
            raise RuntimeError(f"not resumed: {resumed.stderr[-500:]}")
        run(shop, folder / "whole", training=training)
        losses = [np.array([float(row["loss"]) for row in history(folder / name)]) for name in ("killed", "whole")]
    gap = np.abs(losses[0] / losses[1] - 1).max()
    return f"resumed; {len(losses[0])} epochs", f"relative difference of the losses from an uninterrupted run {gap:.1e}"


def shared() -> Found:
    """Several trainings at once, each with a share of the GPU, against one alone."""
    training = {"epochs": 3 if TINY else 200, "patience": 200, "device": DEVICE.type}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shop = prepared(folder, **SHOP)

        def together(label: str, number: int) -> tuple[float, float]:
            clock = time.perf_counter()
            folders = [folder / f"{label}-{seed}" for seed in range(number)]
            runtime = {"threads": 1, "gpus": 1 / SHARES}
            processes = [
                subprocess.Popen(
                    stage_command(shop, one, training | {"seed": seed}, runtime), stderr=subprocess.PIPE, text=True
                )
                for seed, one in enumerate(folders)
            ]
            for process in processes:
                _, log = process.communicate()
                if process.returncode:
                    raise RuntimeError(f"exit status {process.returncode}: {log[-500:]}")
            took = time.perf_counter() - clock
            records: list[dict[str, Any]] = [json.loads((one / "record.json").read_text()) for one in folders]
            return took, sum(record.get("gpu_peak_memory_mb", 0) for record in records)

        alone, _ = together("alone", 1)
        took, memory = together("shared", SHARES)
    return f"{took:.1f} s, {memory:.0f} MB of the GPU", f"one alone {alone:.1f} s"


def gpu_tests(limit: float) -> Found:
    """The tests that need a GPU: formulas against their oracles, resume, CUDA graphs."""
    if TINY:
        return "left out on the CPU", ""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/unit"]
    clock = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    print(done.stdout[-6000:] if done.returncode else "", file=sys.stderr)
    result = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    if done.returncode:
        raise RuntimeError(result)
    return result, f"{time.perf_counter() - clock:.0f} s"


class _Data:
    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(0)
        pairs = np.unique(rng.integers(0, USERS * ITEMS, PAIRS))
        self.users, self.items = (torch.from_numpy(ids).to(DEVICE) for ids in (pairs // ITEMS, pairs % ITEMS))
        ones = np.ones(len(pairs), np.float32)
        self.train = sp.csr_matrix((ones, (pairs // ITEMS, pairs % ITEMS)), (USERS, ITEMS))
        neighbours = rng.integers(0, ITEMS, ITEMS * 10)
        shares = np.full(ITEMS * 10, 0.1, np.float32)
        self.graph = sp.csr_matrix((shares, neighbours, np.arange(0, ITEMS * 10 + 1, 10)), (ITEMS, ITEMS))
        self.on_host = [rng.standard_normal((ITEMS, d), np.float32) for d in (384, width)]

    @property
    def features(self) -> list[Tensor]:
        return [torch.from_numpy(x).to(DEVICE) for x in self.on_host]


def _run(width: int, precision: str = "float32", **training: Any) -> tuple[TrainingRun, _Data]:
    data = _Data(width)
    # The fused slerp, which is the one of a GPU, has no branch that depends on data.
    settings = Model(slerp="fused") if TINY else Model()
    model = build_model(data.on_host, data.train, data.graph, settings, 0, precision).to(DEVICE)
    sampler = Sampler(
        data.users, data.items, ITEMS, batch_size=BATCH, negative_sampling="negative", dedup_pairs=True, seed=0
    )
    validation = Validation(data.train, sp.csr_matrix((USERS, ITEMS)), "recall@20", DEVICE)
    chosen = Training(batch_size=BATCH, **training)
    return TrainingRun(model, sampler, validation, chosen, NullCheckpoint(), None), data


def _steps(one: TrainingRun, batches: list[list[Batch]]) -> tuple[float, Tensor]:
    """Return the mean seconds of the steps after the first, and the recorded values of all."""
    rest = iter(batches)

    def next_step() -> None:
        one.step(next(rest))
        one.state.step += 1

    next_step()
    return seconds(next_step, len(batches) - 1), one.state.losses[: len(batches)].clone()
