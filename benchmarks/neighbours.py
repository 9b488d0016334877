"""Exact nearest neighbours against the bare product of which they are made, as a Markdown table.

    python benchmarks/neighbours.py --rows 63001 --dim 384
    python benchmarks/neighbours.py --rows 1000000 --dim 768 --device cuda --ways product exact
    python benchmarks/neighbours.py --rows 63001 --data clustered --ways exact hnsw ivf

`product` is the blocked float32 product alone, into memory that is reused: the floor for whoever multiplies in float32.
`naive` adds torch.topk to it. Each way runs in a process of its own, whose peak memory is its own. Other work on the
machine changes the seconds, and the CPU seconds less: compare within one table. Rows are `--data random` (Gaussian), or `clustered`: around
N / 60 Gaussian centres with `--spread` of noise; at 0.3 the neighbours lie so close that many rows need a second pass.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cm3.common.usage import peak_memory_mb
from cm3.similarity.exact import knn

K, BLOCK = 10, 512


def features(rows: int, dim: int, data: str, spread: float) -> Tensor:
    """Return (rows, dim) float32 features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=generator)
    if data == "clustered":
        centres = torch.randn(max(1, rows // 60), dim, generator=generator)
        x.mul_(spread)
        for part in torch.arange(rows).split(8192):
            x[part] += centres[torch.randint(0, len(centres), (len(part),), generator=generator)]
    return x


def blocked(x: Tensor, select: bool) -> None:
    """Multiply all rows with all rows, and take the largest K of each where `select` says so."""
    unit = torch.nn.functional.normalize(x, dim=1)
    buffer = torch.empty(BLOCK, len(x), device=x.device)
    for part in unit.split(BLOCK):
        product = torch.mm(part, unit.T, out=buffer[: len(part)])
        if select:
            product.topk(K, dim=1)


def measure(way: str, x: Tensor) -> dict[str, Any]:
    """Run one way in this process; return its seconds, peak memory and what else it tells."""
    found: dict[str, Any] = {"before_mb": peak_memory_mb()}
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        # The first product of a process loads the library.
        torch.mm(x[:64], x[:64].T)
        torch.cuda.synchronize()
    clock, cpu = time.perf_counter(), time.process_time()
    if way in ("product", "naive"):
        blocked(x, way == "naive")
    elif way == "exact":
        knn(x, K)
    else:
        from cm3.similarity.approximate import approximate_knn

        found |= approximate_knn(x, K, way)[2]
    if x.is_cuda:
        torch.cuda.synchronize()
        found["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    spent = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    return found | spent | {"peak_mb": peak_memory_mb()}


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=63_001)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--data", choices=["random", "clustered"], default="random")
    parser.add_argument("--spread", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=["product", "naive", "exact"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        x = features(arguments.rows, arguments.dim, arguments.data, arguments.spread)
        print(json.dumps(measure(arguments.ways[0], x.to(arguments.device))))
        return
    print(
        f"{arguments.rows:,} x {arguments.dim}, {arguments.data}, k = {K}, {arguments.device}, {torch.get_num_threads()} threads\n"
    )
    print("| way | seconds | of the first | CPU seconds | peak MB | of them before | |\n|---|---|---|---|---|---|---|")
    first = None
    for way in arguments.ways:
        given = [
            str(word)
            for name in ("rows", "dim", "data", "spread", "device")
            for word in (f"--{name}", getattr(arguments, name))
        ]
        command = [sys.executable, __file__, *given, "--here", "--ways", way]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        seconds, cpu, peak, before = (found.pop(name) for name in ("seconds", "cpu", "peak_mb", "before_mb"))
        first = first or seconds
        print(
            f"| {way} | {seconds:.1f} | {seconds / first:.2f} | {cpu:.1f} | {peak:.0f} | {before:.0f} | {found or ''} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
