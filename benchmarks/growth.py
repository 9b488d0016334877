"""An epoch's time and memory as the data grow, with one batch per step and with `batches_per_step: auto`.

    python benchmarks/growth.py --times 1 3 10
    python benchmarks/growth.py --users 192403 --items 63001 --interactions 1250000

The first takes Amazon Baby's counts (19,445 users, 7,050 items, 119,674 training pairs) times each factor; the second
any counts, such as Amazon Electronics'. Pairs are drawn with long-tailed popularity, features (384-d and `--image-dim`)
and item graph at random: speed does not depend on them. Each size and setting runs in a process of its own, which times
`--steps` steps after the first and gives an epoch as their mean times its number of steps.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the workflow sets them
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.sparse as sp
import torch

from cm3.config import Model, Training
from cm3.evaluation.ranking import Validation
from cm3.model.graph import item_item_matrix
from cm3.model.model import build_model
from cm3.model.sampling import Sampler
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.loop import TrainingRun
from cm3.training.schedule import batches_per_step, grouped

BABY = (19_445, 7_050, 119_674)
BATCH = 2048


def drawn(n_users: int, n_items: int, n_pairs: int, rng: np.random.Generator) -> sp.csr_matrix:
    """Return a (U, I) matrix of about `n_pairs` distinct pairs; items' popularity falls with the root of their rank."""
    popularity = 1 / np.sqrt(np.arange(1, n_items + 1))
    items = rng.choice(n_items, int(n_pairs * 1.05), p=popularity / popularity.sum())
    keys = np.unique(rng.integers(n_users, size=len(items)) * n_items + items)
    keys = rng.permutation(keys)[:n_pairs]
    return sp.csr_matrix((np.ones(len(keys), np.float32), (keys // n_items, keys % n_items)), (n_users, n_items))


def measure(size: tuple[int, int, int], options: argparse.Namespace, per_step: int) -> tuple[float, float, float]:
    """Return seconds of an epoch, seconds of a validation, and the peak memory in MB."""
    rng = np.random.default_rng(0)
    n_users, n_items, n_pairs = size
    train = drawn(n_users, n_items, n_pairs, rng)
    features = [rng.standard_normal((n_items, dim), np.float32) for dim in (384, options.image_dim)]
    every = np.repeat(np.arange(n_items), 10)
    neighbours = [(every, rng.integers(n_items, size=len(every))) for _ in features]
    graph = item_item_matrix(neighbours, [0.9, 0.1], n_items)
    model = build_model(features, train, graph, Model(), 0, options.precision)
    users, items = (torch.from_numpy(x.astype(np.int64)) for x in train.nonzero())
    sampler = Sampler(users, items, n_items, batch_size=BATCH, negative_sampling="negative", dedup_pairs=True, seed=0)
    validation = Validation(drawn(n_users, n_items, n_users, rng), train, "recall@20")
    training = Training(batch_size=BATCH, batches_per_step=per_step)
    run = TrainingRun(model, sampler, validation, training, NullCheckpoint(), None)
    seconds = []
    for batches in grouped(sampler.epoch(1), per_step):
        started = time.perf_counter()
        run.step(batches)
        seconds.append(time.perf_counter() - started)
        run.state.step += 1
        if len(seconds) > options.steps:
            break
    started = time.perf_counter()
    found = model.embed()
    validation.score(found.users, found.items)
    validated = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return float(np.mean(seconds[1:])) * -(-sampler.n_batches // per_step), validated, peak


def main() -> None:
    """Print a table, and the exponent of an epoch's time by the number of interactions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1], help="factors on Baby's counts")
    for name in ("users", "items", "interactions"):
        parser.add_argument(f"--{name}", type=int, help="a size of its own, with the other two counts")
    parser.add_argument("--image-dim", type=int, default=512)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--batches-per-step", type=int, nargs="+", help="1 and what auto chooses by default")
    options = parser.parse_args()
    sizes = {time: tuple(count * time for count in BABY) for time in options.times}
    if options.users:
        sizes = {max(1, round(options.interactions / BABY[2])): (options.users, options.items, options.interactions)}
    print(
        "| users | items | pairs | batches per step | epoch, s | validation, s | peak MB |\n|---|---|---|---|---|---|---|"
    )
    series: dict[str, dict[int, float]] = {"batches_per_step: 1": {}, "batches_per_step: auto": {}}
    for size in sizes.values():
        auto = batches_per_step(Training(batches_per_step="auto", batch_size=BATCH), size[2])
        for per_step in options.batches_per_step or sorted({1, auto}):
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                epoch, validated, peak = alone.apply(measure, (size, options, per_step))
            counts = " | ".join(f"{count:,}" for count in size)
            print(f"| {counts} | {per_step} | {epoch:.1f} | {validated:.1f} | {peak:.0f} |", flush=True)
            for name, belongs in zip(series, (per_step == 1, per_step == auto), strict=True):
                if belongs:
                    series[name][size[2]] = epoch
    for name, epochs in series.items():
        if len(epochs) > 1:
            slope, _ = np.polyfit(np.log(list(epochs)), np.log(list(epochs.values())), 1)
            print(f"\n{name}: an epoch's time grows as pairs ^ {slope:.2f}")


if __name__ == "__main__":
    main()
