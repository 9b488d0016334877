"""The comparison of a study: seconds and peak memory of the stage `cm3.reports.analysis.compare`, as a Markdown table.

    python benchmarks/comparison.py --cells 6 --seeds 3
    python benchmarks/comparison.py --users 200000 --items 63001 --cells 55

Cells are generated in a temporary folder (100 MB each): lists of 50 popular items in which some of a user's truth is
planted, their metrics at 10, 20 and 50, and embeddings of width 192, which the seeds of a model share. The stage runs
alone, with one thread for products, 10,000 resamples and all pairs of models; imports are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cm3.common.embeddings import write_embeddings
from cm3.common.files import write_json
from cm3.common.interactions import Interactions, read_interactions
from cm3.common.tables import INTERACTIONS, ITEMS, SPLITS, USERS, write_table
from cm3.evaluation.metrics import per_user
from cm3.evaluation.recommendations import ids_of, write_recommendations
from cm3.evaluation.results import RankedLists, UserMetrics, write_per_user

TOP, CUTOFFS, WIDTH, BOUGHT, WANTED = 50, [10, 20, 50], 192, 6, 2


def write_shop(folder: Path, n_users: int, n_items: int) -> dict[str, Path]:
    """Write a data set in which each user bought six items in training and wants one or two in the test."""
    rng = np.random.default_rng(0)
    split = np.tile([0] * BOUGHT + [2] * WANTED, n_users).astype(np.int8)
    columns: dict[str, Any] = {
        "user": np.repeat(np.arange(n_users), BOUGHT + WANTED),
        "item": (n_items * rng.random(len(split)) ** 3).astype(int),
        "rating": np.ones(len(split)),
        "timestamp": np.arange(len(split)),
        "split": pa.DictionaryArray.from_arrays(pa.array(split), pa.array(SPLITS)),
    }
    paths = {name: folder / f"{name}.parquet" for name in ("interactions", "items", "users")}
    write_table(paths["interactions"], pa.table(columns), INTERACTIONS)
    users = [f"A{user * 2654435761 % 2**42:013X}" for user in range(n_users)]
    write_table(paths["users"], pa.table({"user": np.arange(n_users), "user_id": users}), USERS)
    items = {field.name: pa.nulls(n_items, field.type) for field in ITEMS}
    items |= {"item": np.arange(n_items), "item_id": [f"B{i * 2654435761 % 10**9:09d}" for i in range(n_items)]}
    write_table(paths["items"], pa.table(items), ITEMS)
    return paths


def write_cell(folder: Path, shop: Interactions, quality: float, seed: int) -> dict[str, Path]:
    """Write what a run's evaluation leaves: the better the model, the more of the truth is in its lists."""
    rng, truth, n_blocks = np.random.default_rng(seed), shop.matrix("test"), len(shop.item_ids) // TOP
    # A list has one item of each remainder by 50, so none twice.
    place = rng.permutation(TOP)
    lists = np.empty((len(shop.user_ids), TOP), np.int64)
    lists[:, place] = (n_blocks * rng.random(lists.shape) ** 3).astype(np.int64) * TOP + np.arange(TOP)
    users, items = truth.nonzero()
    hit = rng.random(len(users)) < quality
    lists[users[hit], place[items[hit] % TOP]] = items[hit]
    values, scores = per_user(lists, truth, CUTOFFS), rng.random(lists.shape, np.float32)
    found = UserMetrics(np.arange(len(lists)), np.diff(truth.indptr), values)
    ranked = RankedLists(found.users, lists, scores)
    files = {kind: folder / f"{kind}-{seed}" for kind in ("per_user", "recommendations", "evaluation", "train")}
    write_per_user(files["per_user"], found)
    write_recommendations(files["recommendations"], [ranked], ids_of(shop.user_ids, shop.item_ids), TOP)
    write_json(files["evaluation"], {"test": found.means(), "mask": "train"})
    write_json(files["train"], {"monitor": "recall@20", "best_valid": quality, "wall_seconds": 1.0})
    return files


def write_study(folder: Path, n_users: int, n_items: int, n_cells: int, seeds: int) -> dict[str, Any]:
    """Write all cells and return the spec and the inputs of their comparison."""
    inputs = write_shop(folder, n_users, n_items)
    shop = read_interactions(*(inputs[name] for name in ("interactions", "items", "users")))
    cells, models = [], [f"model{number}" for number in range(-(-n_cells // seeds))]
    for number in range(n_cells):
        model, seed, run = number // seeds, number % seeds, f"{number:012x}"
        vectors = {kind: folder / f"{kind}-{model}.parquet" for kind in ("user_embeddings", "item_embeddings")}
        for (kind, path), ids in zip(vectors.items(), (shop.user_ids, shop.item_ids), strict=True):
            if not seed:
                x = np.random.default_rng(model).standard_normal((len(ids), WIDTH), np.float32)
                write_embeddings(path, kind.replace("embeddings", "id"), ids, x, {"epoch": 1})
        files = write_cell(folder, shop, 0.3 - 0.02 * model, number) | vectors
        inputs |= {f"{kind}.{models[model]}.{run}": path for kind, path in files.items()}
        cells.append({"experiment": models[model], "run": run, "seed": seed, "command": "snakemake"})
    metrics = [f"{name}@{k}" for k in (20, 10, 50) for name in ("recall", "ndcg")]
    experiments = {model: {"model": model, "dataset": "shop"} for model in models}
    spec = {"study": "trial", "metrics": metrics, "experiments": experiments, "cells": cells}
    outputs = {name: str(folder / f"{name}.out") for name in ("comparison", "table", "record")}
    told = {name: str(path) for name, path in inputs.items()}
    return {"spec": spec, "runtime": {}, "code": "", "inputs": told, "outputs": outputs}


def main() -> None:
    """Print a row for each number of cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=63_001)
    parser.add_argument("--cells", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print("| models x seeds | tests | seconds | peak MB |\n|---|---|---|---|")
    for cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            call = write_study(Path(folder), arguments.users, arguments.items, cells, arguments.seeds)
            write_json(Path(folder) / "cells.json", call)
            command = [sys.executable, "-m", "cm3.reports.analysis.compare", "--call", str(Path(folder) / "cells.json")]
            one = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stderr=subprocess.DEVNULL, env=one)
            record = json.loads(Path(call["outputs"]["record"]).read_text())
        seconds, peak, models = record["wall_seconds"], record["peak_memory_mb"], len(call["spec"]["experiments"])
        print(f"| {models} x {arguments.seeds} | {record['tests']} | {seconds:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
