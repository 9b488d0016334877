"""A small shop and the cells of a study on it: planted models, scored by the real evaluation stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles_cm3 as oracle
import pyarrow.parquet as pq
import pytest
from training_shop import one_thread  # noqa: F401

from cm3.common.embeddings import write_embeddings
from cm3.common.files import read_json, write_json
from cm3.common.strict import validate
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.reports.analysis.compare import compare
from cm3.reports.analysis.spec import StudySpec

WIDTH = 6


class Shop:
    """Users who buy near their taste and what is popular; the last items are cold, histories differ in length."""

    def __init__(self, folder: Path, n_users: int = 120, n_items: int = 60, n_cold: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.folder, self.n_users, self.n_items = folder, n_users, n_items
        self.taste = rng.standard_normal((n_users, WIDTH))
        self.kind = rng.standard_normal((n_items, WIDTH))
        self.popularity = 2.5 * rng.standard_normal(n_items)
        users, items, split = [], [], []
        longest = min(14, n_items - n_cold - 2)
        for user in range(n_users):
            liked = self.taste[user] @ self.kind.T + self.popularity + rng.gumbel(size=n_items)
            warm = np.argsort(-liked[: n_items - n_cold])
            length = int(rng.integers(4, longest))
            bought, labels = warm[:length], [0] * (length - 2) + [1, 2]
            if user % 10 == 0 and n_cold:
                # A cold item can only be wanted in the test split.
                bought, labels = np.append(bought, n_items - 1 - user // 10 % n_cold), [*labels, 2]
            users += [user] * len(bought)
            items += bought.tolist()
            split += labels
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = oracle.write_interactions(
            folder, np.array(users), np.array(items), np.array(split, np.int8), n_users, n_items
        )
        self.pairs = list(zip(users, items, split, strict=True))

    def vectors(self, quality: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings that know the shop by `quality` (0: noise, 1: the truth), in float32."""
        rng = np.random.default_rng(seed)
        users = np.column_stack([self.taste, np.ones(self.n_users)]) * quality
        items = np.column_stack([self.kind, self.popularity]) * quality
        users = users + (1 - quality) * rng.standard_normal(users.shape)
        items = items + (1 - quality) * rng.standard_normal(items.shape)
        return users.astype(np.float32), items.astype(np.float32)

    def cell(
        self,
        experiment: str,
        run: str,
        vectors: tuple[np.ndarray, np.ndarray],
        *,
        valid: float | None = None,
        embeddings: bool = True,
        settings: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> dict[str, Path]:
        """Evaluate one run and return its files by the names of the comparison's inputs.

        `valid` overrides the validation score in the training record, which else is the evaluation's own.
        """
        folder = self.folder / "results" / experiment / "runs" / run
        folder.mkdir(parents=True)
        named = {"user_embeddings": "user", "item_embeddings": "item"}
        files = {kind: folder / f"{kind}.parquet" for kind in named}
        for (kind, name), x in zip(named.items(), vectors, strict=True):
            ids = [f"{name}{i}" for i in range(len(x))]
            write_embeddings(files[kind], f"{name}_id", ids, x, {"epoch": 1})
        outputs = {
            "evaluation": folder / "evaluation.json",
            "per_user": folder / "per_user.parquet",
            "recommendations": folder / "recommendations.parquet",
        }
        result = evaluate(
            **self.paths,
            files=files,
            settings=Evaluation(**{"ks": [5, 10], "top_n": 20} | dict(settings or {})),
            metrics_output=outputs["evaluation"],
            per_user_output=outputs["per_user"],
            recommendations_output=outputs["recommendations"],
        )
        train = folder / "train.stage.json"
        told = {
            "monitor": "recall@10",
            "best_valid": result["valid"]["recall@10"] if valid is None else valid,
            "wall_seconds": 12.5,
            "peak_memory_mb": 640.0,
            "seconds_per_epoch": 0.5,
            "epochs": 25,
            "parameters": 12345,
            "device": "cpu",
        }
        write_json(train, told | dict(record or {}))
        if not embeddings:
            files = {}
        return {f"{kind}.{experiment}.{run}": path for kind, path in {**files, **outputs, "train": train}.items()}


def cell_spec(experiment: str, run: str, seed: int, point: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "run": run,
        "seed": seed,
        "point": dict(point or {}),
        "command": f"snakemake --cores 8 results/{experiment}/runs/{run}/evaluation.json",
    }


def experiment_spec(model: str, **given: Any) -> dict[str, Any]:
    return {"model": model, "dataset": "shop", **given}


def make_study(
    shop: Shop, plans: Mapping[str, Mapping[str, Any]], seeds: Sequence[int] = (1, 2, 3), **study: Any
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the spec and inputs of a study.

    A plan has the experiment's `spec`, its `quality` (or one per grid value in `grid`: {value: quality} of model.gamma),
    and may say `deterministic` (one run for all seeds), `embeddings: False`, `settings` and `record` of each cell.
    """
    inputs, cells, number = dict(shop.paths), [], 0
    for name, plan in plans.items():
        points = plan.get("grid") or {None: plan["quality"]}
        options = {key: plan[key] for key in ("embeddings", "settings", "record") if key in plan}
        for value, quality in points.items():
            point = {} if value is None else {"model.gamma": value}
            if plan.get("deterministic"):
                run = f"{number:012x}"
                inputs |= shop.cell(name, run, shop.vectors(quality, number), **options)
                cells += [cell_spec(name, run, seed, point) for seed in seeds]
                number += 1
                continue
            for seed in seeds:
                run = f"{number:012x}"
                drawn = shop.vectors(quality, plan.get("noise", 1000 * number) + seed)
                inputs |= shop.cell(name, run, drawn, **options)
                cells.append(cell_spec(name, run, seed, point))
                number += 1
    spec = {
        "study": "trial",
        "command": "snakemake --cores 8 results/trial/comparison.json",
        "metrics": ["recall@10", "ndcg@10", "recall@5"],
        "cells": cells,
        "experiments": {name: plan["spec"] for name, plan in plans.items()},
        "resamples": 1000,
        **study,
    }
    return spec, inputs


MODALITIES = {"text": "minilm", "image": "mobilenet"}
NOISE = {"text": "gaussian", "image": "gaussian"}
FINE, POOR = 0.8, 0.4


def plans():
    spec = experiment_spec
    return {
        "cm3": {"spec": spec("cm3", modalities=MODALITIES), "grid": {0.1: POOR, 0.5: FINE, 0.9: 0.5}},
        "noise": {"spec": spec("cm3", modalities=MODALITIES, control=NOISE, control_of="cm3"), "quality": 0.5},
        "bm3": {"spec": spec("bm3", modalities=MODALITIES), "quality": 0.55},
        "ease": {"spec": spec("ease"), "quality": 0.56, "deterministic": True, "embeddings": False},
        "mostpop": {"spec": spec("mostpop"), "quality": 0.2, "deterministic": True},
    }


def run(spec, inputs, folder, **study):
    return compare(
        study=validate(StudySpec, spec | study, "study"),
        inputs=inputs,
        comparison_output=folder / "comparison.json",
        table_output=folder / "comparison.csv",
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    shop = Shop(folder)
    spec, inputs = make_study(shop, plans())
    return shop, spec, inputs, folder, run(spec, inputs, folder)


def changed(inputs, kind, edit):
    """The inputs with one cell's table edited: `edit` takes and returns a pyarrow table."""
    name = next(name for name in inputs if name.startswith(f"{kind}.bm3."))
    path = inputs[name].with_name(f"edited-{inputs[name].name}")
    pq.write_table(edit(pq.read_table(inputs[name])), path)
    return inputs | {name: path}


def edited_json(inputs, kind, edit):
    name = next(name for name in inputs if name.startswith(f"{kind}.bm3."))
    path = inputs[name].with_name(f"edited-{inputs[name].name}")
    write_json(path, edit(read_json(inputs[name])))
    return inputs | {name: path}
