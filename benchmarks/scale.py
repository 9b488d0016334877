"""Time and peak memory of each stage against the number of items, fitted exponents, and what breaks first.

    python benchmarks/scale.py --items 10000 30000 100000 1000000 --limit-seconds 3600 --limit-gb 20
    python benchmarks/scale.py --items 100000 1000000 --stages similarity --folder /tmp/scale
    python benchmarks/scale.py --items 100000 --stages train evaluate publish --batches-per-step 64 --folder /tmp/scale

Shops are made up by benchmarks/scale_data.py. Each stage runs as the workflow runs it, `python -m STAGE` in its threads
and environment: seconds are those of the whole process, peak memory is what the kernel counted (wait4). Neighbours are
exact up to `--approximate-from` items, and approximate from there on (hnsw where faiss is installed). Training takes
one epoch of one modality with its validation, and the exact graph or else an approximate one. What is over a limit is
stopped, and not tried on more items; what needs its output is skipped. With `--folder` files stay, and stages not in
`--stages` are taken as they lie there.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Nothing heavy is imported: the kernel counts a parent's memory at the start into its child's peak.
from cm3.common.stages import STAGES  # noqa: E402

ABOVE = 2.0  # seconds above start-up from which a run tells of growth
METHODS = ("exact", "ivf", "hnsw") if importlib.util.find_spec("faiss") else ("exact", "ivf")

_TABLES = "interactions=split/interactions.parquet items=prepare/items.parquet users=prepare/users.parquet"
_VECTORS = "user_embeddings=train/users.parquet item_embeddings=train/items.parquet"
INPUTS = {
    "prepare": "interactions=data/interactions.tsv items=data/items.tsv",
    "split": "ratings=prepare/ratings.parquet",
    "similarity": "features=data/features.parquet",
    "train": f"{_TABLES} features.image=data/features.parquet similarity.image=GRAPH/similarity.parquet",
    "evaluate": f"{_TABLES} {_VECTORS}",
    "publish": f"{_VECTORS} items=prepare/items.parquet users=prepare/users.parquet model=train/model.safetensors history=train/history.csv stats=prepare/stats.json "
    "evaluation=evaluate/metrics.json per_user=evaluate/per_user.parquet recommendations=evaluate/recommendations.parquet "
    "record.prepare=prepare/record.json record.split=split/record.json record.extract.image=data/extract.json "
    "record.similarity.image=GRAPH/record.json record.train=train/record.json record.evaluate=evaluate/record.json",
}
"""What a stage reads, STAGE/FILE by name; GRAPH is the similarity that there is."""
OUTPUTS = {
    "prepare": "ratings.parquet items.parquet users.parquet stats.json record.json",
    "split": "interactions.parquet record.json",
    "similarity": "similarity.parquet record.json",
    "train": "model.safetensors history.csv users.parquet items.parquet record.json",
    "evaluate": "metrics.json per_user.parquet recommendations.parquet record.json",
    "publish": "metrics.json per_user.parquet recommendations.parquet history.csv model.safetensors "
    "user_embeddings.parquet item_embeddings.parquet",
}
"""What it writes; an output's name is the file's, without suffix."""


@dataclass(frozen=True)
class Run:
    """One process: its seconds, its peak memory in MB (10^6 bytes), and what went wrong, if anything did."""

    seconds: float
    mb: float
    fault: str = ""

    @property
    def cell(self) -> str:
        """What the table says of it."""
        taken = f"{self.seconds:.1f} s, {self.mb:,.0f} MB" if self.seconds else ""
        return ": ".join(filter(None, [self.fault, taken]))


Runs = dict[str, dict[int, Run]]  # by stage and number of items


def run(job: str, arguments: Sequence[str], log: Path, options: argparse.Namespace) -> Run:
    """Run a stage to its end or to a limit."""
    command = [sys.executable, "-m", STAGES[job.partition("-")[0]].module, *arguments]
    # As the workflow does.
    lent = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "3000",
        "THP_MEM_ALLOC_ENABLE": "1",
        "CM3_STOP_WITH_PARENT": "1",
    }
    environment = {**lent, **os.environ, "PYTHONPATH": str(ROOT)}
    clock, fault, pid = time.perf_counter(), "", 0
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        while not pid:
            time.sleep(0.02)
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            if time.perf_counter() - clock > options.limit_seconds:
                fault = f"over {options.limit_seconds:g} s"
            elif pages * os.sysconf("SC_PAGE_SIZE") > options.limit_gb * 1e9:
                fault = f"over {options.limit_gb:g} GB"
            if fault:
                os.killpg(process.pid, signal.SIGKILL)
            pid, status, usage = os.wait4(process.pid, 0 if fault else os.WNOHANG)
    finally:
        if not pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not fault:
        fault = f"failed ({process.returncode}): " + (log.read_text().splitlines() or ["without a word"])[-1][-200:]
    return Run(time.perf_counter() - clock, usage.ru_maxrss * 1024 / 1e6, fault)


def call(job: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a stage is told; `job` is its name, of similarity with the method behind it."""
    stage, _, method = job.partition("-")
    graph = next((m for m in METHODS if (place / f"similarity-{m}/similarity.parquet").exists()), METHODS[0])
    training = {
        "epochs": 1,
        "batch_size": options.batch_size,
        "batches_per_step": options.batches_per_step,
        "precision": options.precision,
    }
    spec = {
        "similarity": {"knn_k": 10, "method": method, "missing": "drop"},
        "train": {"modalities": ["image"], "model": {"embedding_dim": 64}, "training": training},
        "evaluate": {},
        "publish": {"experiment": "scale", "dataset": "scale", "command": "", "config": {}, "keys": {}},
        **json.loads((place / "data/specs.json").read_text()),
    }[stage]
    pairs = (pair.split("=") for pair in INPUTS[stage].replace("GRAPH", f"similarity-{graph}").split())
    return {
        "spec": spec,
        "runtime": {"threads": options.cores, "device": "cpu"},
        "inputs": {name: str(place / path) for name, path in pairs},
        "outputs": {Path(name).stem: str(place / job / name) for name in OUTPUTS[stage].split()},
        "code": "scale",
    }


def measure(job: str, place: Path, options: argparse.Namespace) -> Run:
    """Run a stage on the shop in `place`; nothing of an earlier run of it, or of one that broke, is left."""
    arguments = call(job, place, options)
    absent = {Path(path).parent.name for path in arguments["inputs"].values() if not Path(path).exists()}
    if absent:
        return Run(0, 0, f"skipped, no output of {', '.join(sorted(absent))}")
    shutil.rmtree(place / job, ignore_errors=True)
    file = place / f"logs/{job}.json"
    file.write_text(json.dumps(arguments))
    done = run(job, ["--call", str(file)], place / f"logs/{job}.log", options)
    if done.fault:
        shutil.rmtree(place / job, ignore_errors=True)
    return done


def jobs(stages: Sequence[str], size: int, approximate_from: int) -> list[str]:
    """Return what to run at a size, in order: similarity once for each method."""
    methods = [m for m in METHODS if (size <= approximate_from if m == "exact" else size >= approximate_from)]
    similarity = [f"similarity-{m}" for m in methods]
    return [job for s in INPUTS if s in stages for job in (similarity if s == "similarity" else [s])]


def fitted(runs: dict[int, Run], start: Run, what: str, limit: float) -> tuple[float, float] | None:
    """Fit a power of the number of items to `what`, seconds or mb above start-up.

    Returns:
        the exponent, and where the limit is met, going on from the largest size; None for fewer than two sizes.
    """
    grown = {n: r for n, r in runs.items() if not r.fault and r.seconds - start.seconds > ABOVE}
    if len(grown) < 2:
        return None
    sizes = [math.log(n) for n in grown]
    values = [math.log(max(1.0, getattr(r, what) - getattr(start, what))) for r in grown.values()]
    slope = statistics.linear_regression(sizes, values).slope
    room = math.log(max(1.0, limit - getattr(start, what))) - values[-1]
    return slope, math.exp(sizes[-1] + room / slope) if slope > 0 else math.inf


def report(results: Runs, starts: dict[str, Run], options: argparse.Namespace) -> str:
    """Return the Markdown table of all runs, and which stage breaks first."""
    limits = {"seconds": (options.limit_seconds, "s"), "mb": (options.limit_gb * 1e3, "MB")}
    heads = ["stage", "start-up", *(f"{n:,} items" for n in options.items)]
    heads += ["exponent of time", "of memory", "breaks at"]
    rows, order = [heads, ["---"] * len(heads)], []
    for job, runs in results.items():
        fits = {what: fitted(runs, starts[job], what, limit) for what, (limit, _) in limits.items()}
        met = [(float(n), run.fault.split(":")[0]) for n, run in runs.items() if run.fault and run.seconds]
        met += [(fit[1], f"{limits[what][0]:,g} {limits[what][1]} by the fit") for what, fit in fits.items() if fit]
        size, reason = min(met, default=(math.inf, ""))
        where = f"{float(f'{size:.2g}'):,.0f} items ({reason})" if size < math.inf else "-"
        cells = [run.cell for run in (starts[job], *(runs.get(n, Run(0, 0, "not tried")) for n in options.items))]
        rows.append([job, *cells, *(f"{fit[0]:.2f}" if fit else "-" for fit in fits.values()), where])
        order.append((size, f"`{job}` at {where}"))
    breaks = ", then ".join(text for size, text in sorted(order) if size < math.inf)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{table}

Seconds and peak MB of whole processes. Exponents are of what is above start-up, by least squares of the logarithms over
the sizes that take more than {ABOVE:g} s above it, if there are two. A stage breaks where it was stopped or, earlier, where
its fit meets a limit. {f"First breaks {breaks}." if breaks else "Nothing broke, and no growth could be fitted."}"""


def measure_all(results: Runs, starts: dict[str, Run], folder: Path, options: argparse.Namespace) -> None:
    """Make each shop, run the stages on it and put what they took into `results`, and bare starts into `starts`."""
    say = functools.partial(print, file=sys.stderr, flush=True)
    for size in options.items:
        place, users = folder / f"scale-{size}", round(size * options.users_per_item)
        shop = {"items": size, "users": users, "interactions": round(users * options.interactions_per_user)}
        words = [f"--{name}={value}" for name, value in (shop | {"dim": options.dim, "kcore": options.kcore}).items()]
        maker = [sys.executable, str(Path(__file__).with_name("scale_data.py")), str(place / "data"), *words]
        clock = time.perf_counter()
        subprocess.run(maker, check=True)
        (place / "logs").mkdir(exist_ok=True)
        say(f"{', '.join(f'{n:,} {name}' for name, n in shop.items())}: {time.perf_counter() - clock:.0f} s to make")
        for job in jobs(options.stages, size, options.approximate_from):
            runs, log = results.setdefault(job, {}), place / "logs/start.log"
            # Twice: the first reads the libraries from the disk.
            starts[job] = starts.get(job) or [run(job, ["--help"], log, options) for _ in range(2)][1]
            if not any(earlier.fault and earlier.seconds for earlier in runs.values()):
                runs[size] = measure(job, place, options)
                record = place / job / "record.json"
                counts = json.loads(record.read_text()).get("counts", {}) if record.exists() else {}
                say(f"  {job}: {runs[size].cell}" + (f", recall {counts['recall']:.4f}" if "recall" in counts else ""))
        if not options.folder:
            shutil.rmtree(place)


def main() -> None:
    """Print what each run took as it ends, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", required=True)
    parser.add_argument("--stages", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--folder", type=Path, help="where files stay; by default they go after each size")
    parser.add_argument("--precision", default="float32", help="of training; default %(default)s")
    integers = {
        "kcore": 5,
        "dim": 768,
        "approximate-from": 100_000,
        "batch-size": 16_384,
        "batches-per-step": 1,
        "cores": 2,
    }
    numbers = {"users-per-item": 10.0, "interactions-per-user": 10.0, "limit-seconds": 600.0, "limit-gb": 20.0}
    for name, default in (integers | numbers).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default %(default)s")
    options = parser.parse_args()
    options.items = sorted(set(options.items))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is told then, too
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    results, starts = Runs(), dict[str, Run]()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            measure_all(results, starts, (options.folder or Path(temporary)).resolve(), options)
        finally:
            print(report(results, starts, options))


if __name__ == "__main__":
    main()
