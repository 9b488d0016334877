"""What `tests/gpu/check.sh` runs: one row per check, with seconds, the floor they are compared with, and memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(ROOT / "benchmarks"), str(ROOT / "tests/gpu")]

from extraction_rows import image_row, text_row  # noqa: E402
from training import Opponent  # noqa: E402
from training_shop import prepared, run  # noqa: E402

from cm3.common.device import select_device  # noqa: E402
from cm3.config import Model, Training  # noqa: E402
from cm3.evaluation.ranking import Ranking, Validation  # noqa: E402
from cm3.model.model import build_model  # noqa: E402
from cm3.model.sampling import Sampler  # noqa: E402
from cm3.similarity.exact import knn  # noqa: E402
from cm3.training.checkpoint import NullCheckpoint  # noqa: E402
from cm3.training.loop import TrainingRun  # noqa: E402

DEVICE = torch.device(os.environ.get("CM3_CHECK_DEVICE", "cuda"))
TINY = DEVICE.type == "cpu"
SEEDS = (1, 2) if TINY else (1, 2, 3)
LIMIT = 120  # seconds of the gpu tests

# Baby's numbers of users, items and training pairs; the rows of Clothing; users of an evaluation.
USERS, ITEMS, PAIRS, WIDTHS = (200, 100, 2_000, (16, 32)) if TINY else (19_445, 7_050, 118_551, (512, 4096))
ROWS, KNN_WIDTHS, EVALUATED = (500, (16,), 300) if TINY else (63_001, (384, 4096), 200_000)


def wait() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Return the mean time of a call after the others have ended."""
    wait()
    clock = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - clock) / times


def row(check: str, found: str, compared: str = "") -> None:
    """Print a row and the memory that the check took at its peak."""
    memory = ""
    if DEVICE.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
    print(f"| {check} | {found} | {compared} | {memory} |", flush=True)


def gpu_tests() -> None:
    """The oracle tests and the resume test on the GPU."""
    if TINY:
        row("tests marked gpu", "left out on the CPU")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/unit"]
    clock = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
        result = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
        if done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
    except subprocess.TimeoutExpired:
        result = f"not finished after {LIMIT} s"
    row("tests marked gpu", result, f"{time.perf_counter() - clock:.0f} s")


def same_metrics() -> None:
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
    row(
        "recall@10 of a small shop, mean of seeds",
        f"{ours.mean():.4f} on {DEVICE.type}, {cpu.mean():.4f} on cpu",
        f"deviation between seeds {cpu.std(ddof=1):.4f}, largest difference of a seed {np.abs(ours - cpu).max():.4f}",
    )


def training(width: int, precision: str) -> None:
    """Steps of CM3 on random data of Baby's size against CM3 written plainly, and the products of features alone."""
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, USERS * ITEMS, PAIRS))
    users, items = (torch.from_numpy(ids).to(DEVICE) for ids in (pairs // ITEMS, pairs % ITEMS))
    train = sp.csr_matrix((np.ones(len(pairs), np.float32), (pairs // ITEMS, pairs % ITEMS)), (USERS, ITEMS))
    neighbours = rng.integers(0, ITEMS, ITEMS * 10)
    graph = sp.csr_matrix((np.full(ITEMS * 10, 0.1, np.float32), neighbours, np.arange(0, ITEMS * 10 + 1, 10)))
    graph = sp.csr_matrix(graph, shape=(ITEMS, ITEMS))
    features = [rng.standard_normal((ITEMS, d), np.float32) for d in (384, width)]
    settings = replace_batch(Training())
    model = build_model(features, train, graph, Model(), 0, precision).to(DEVICE)
    sampler = Sampler(
        users,
        items,
        ITEMS,
        batch_size=settings.batch_size,
        negative_sampling="negative",
        dedup_pairs=True,
        seed=0,
    )
    validation = Validation(train, sp.csr_matrix((USERS, ITEMS)), "recall@20", DEVICE)
    ours = TrainingRun(model, sampler, validation, settings, NullCheckpoint(), None)
    batches = list(sampler.epoch(1))
    epoch_draws = seconds(lambda: list(sampler.epoch(2)))

    def step() -> None:
        ours.step(batches[:1])

    on_device = [torch.from_numpy(x).to(DEVICE) for x in features]
    plain = Opponent(on_device, train, graph).to(DEVICE)
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3)
    batch = batches[0]

    def their_step() -> None:
        optimiser.zero_grad()
        t = torch.rand(ITEMS, device=DEVICE)
        plain.loss(t, batch.users, batch.items, batch.negatives).backward()
        optimiser.step()

    weights = [torch.randn(320, x.shape[1], device=DEVICE) for x in on_device]

    def floor() -> None:
        for x, weight in zip(on_device, weights, strict=True):
            (x @ weight.T).T @ x

    times = 3 if TINY else 20
    for work in (step, their_step, floor):
        work()
    found = [seconds(work, times) for work in (step, their_step, floor)]
    embeddings = model.embed()
    validated = seconds(lambda: validation.score(embeddings.users, embeddings.items))
    epoch = found[0] * len(batches) + epoch_draws + validated
    row(
        f"step of CM3, images {width}-d, {precision}",
        f"{1e3 * found[0]:.1f} ms; epoch with validation {epoch:.2f} s",
        f"written plainly {1e3 * found[1]:.1f} ms; products of features alone {1e3 * found[2]:.1f} ms",
    )


def replace_batch(settings: Training) -> Training:
    """Smaller batches on tiny data."""
    return settings.model_copy(update={"batch_size": 256}) if TINY else settings


def neighbours(width: int) -> None:
    """Exact neighbours against the product that they need at least."""
    x = torch.randn(ROWS, width, device=DEVICE)
    unit = torch.nn.functional.normalize(x, dim=1)

    def floor() -> None:
        for part in unit.split(4096):
            part @ unit.T

    floor()
    knn(x[:2000], 10)
    row(
        f"10 exact neighbours of {ROWS:,} x {width}",
        f"{seconds(lambda: knn(x, 10)):.2f} s",
        f"float32 product {seconds(floor):.2f} s",
    )


def evaluation() -> None:
    """Top 50 of all items for many users."""
    users, items = torch.randn(EVALUATED, 256, device=DEVICE), torch.randn(ROWS, 256, device=DEVICE)
    rng = np.random.default_rng(0)
    seen = rng.integers(0, ROWS, EVALUATED * 8).astype(np.int32)
    masked = sp.csr_matrix((np.ones(len(seen), np.float32), seen, np.arange(0, len(seen) + 1, 8)), (EVALUATED, ROWS))
    ranking = Ranking(np.arange(EVALUATED), masked, DEVICE)

    def floor() -> None:
        for part in users.split(1024):
            part @ items.T

    floor()
    row(
        f"top 50 of {ROWS:,} items for {EVALUATED:,} users",
        f"{seconds(lambda: ranking.top(users, items, 50)):.2f} s",
        f"float32 product {seconds(floor):.2f} s",
    )


def images() -> None:
    """Images through ViT-B/32 with random weights."""
    architecture, count, batch = ("ViT-S-32-alt", 8, 4) if TINY else ("ViT-B-32", 4096, 256)
    image_row(architecture, count, batch, DEVICE.type, seconds, row)


def texts() -> None:
    """Texts through MiniLM."""
    count, batch = (16, 8) if TINY else (50_000, 512)
    text_row(count, batch, DEVICE.type, seconds, row)


def main() -> None:
    """Print the table."""
    select_device(DEVICE.type, "CM3_CHECK_DEVICE")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, tiny data"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print("| check | found | to compare with | peak MB |\n|---|---|---|---|", flush=True)
    checks: list[Callable[[], None]] = [
        same_metrics,
        *(
            lambda width=width, precision=precision: training(width, precision)
            for width in WIDTHS
            for precision in ("float32", "tf32", "bfloat16")
        ),
        *(lambda width=width: neighbours(width) for width in KNN_WIDTHS),
        evaluation,
        images,
        texts,
        gpu_tests,
    ]
    failed = 0
    for check in checks:
        try:
            check()
        except Exception as error:  # a row for each check, whatever happens to one
            failed += 1
            row(getattr(check, "__name__", "check"), f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
