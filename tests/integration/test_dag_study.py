"""A study from raw data to its page: every cell is a cached job, and only new cells run."""

import copy
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from checkout import SMALL, Checkout

from cm3.common.features import read_features

PAGE = "results/compared/comparison.html"
AFTER = {"study_runs": 1, "study": 1, "study_page": 1}


def config(gammas: tuple[float, ...] = (0.9,), seeds: tuple[int, ...] = (1, 2), *more: str) -> dict[str, Any]:
    """The small shop, by its images alone, against noise in their place and against EASE."""
    whole = copy.deepcopy(SMALL)
    whole["experiments"]["shop"]["modalities"] = {"image": "looks"}
    whole["experiments"] |= {
        "noise": {"like": "shop", "control": "gaussian"},
        "ease": {"like": "shop", "model": {"name": "ease"}},
        "lightgcn": {"like": "shop", "model": {"name": "lightgcn", "embedding_dim": 16}},
        "shuffled": {"like": "shop", "control": "shuffled"},
    }
    whole["studies"] = {
        "compared": {
            "experiments": ["shop", "noise", "ease", *more],
            "seeds": list(seeds),
            "grids": {"shop": {"model.gamma": list(gammas)}},
        }
    }
    return whole


def on_splits(whole: dict[str, Any], repeats: int) -> dict[str, Any]:
    whole["studies"]["compared"]["split"] = {"repeats": repeats}
    return whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("study") / "finished", config())
    checkout.run(PAGE)
    return checkout


def read(checkout: Checkout, path: str) -> Any:
    return json.loads((checkout.folder / path).read_text())


def test_the_comparison_holds_the_means_of_the_cells(finished: Checkout):
    comparison = read(finished, "results/compared/comparison.json")
    assert list(comparison["experiments"]) == ["shop", "noise", "ease"]
    assert [(c["experiment"], c["seed"]) for c in comparison["cells"]] == [
        (name, seed) for name in ("shop", "noise", "ease") for seed in (1, 2)
    ]
    for name, entry in comparison["experiments"].items():
        runs = [c["run"] for c in comparison["cells"] if c["experiment"] == name]
        assert (runs[0] == runs[1]) == (name == "ease")
        values = [read(finished, f"results/{name}/runs/{run}/evaluation.json")["test"]["recall@10"] for run in runs]
        assert entry["metrics"]["recall@10"]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        users = pq.read_table(finished.folder / f"results/{name}/runs/{runs[0]}/per_user.parquet")
        assert np.mean(users.column("recall@10").to_numpy()) == pytest.approx(values[0], abs=1e-12)
    assert comparison["experiments"]["noise"]["control_of"] == "shop"
    assert all(entry["beyond"]["diversity_image@10"]["mean"] > 0 for entry in comparison["experiments"].values())
    assert (finished.folder / "results/compared/comparison.csv").read_text().count("\n") > 3
    page = (finished.folder / PAGE).read_text()
    assert "ease" in page
    assert list((finished.folder / "results/compared/figures").glob("*.svg"))


def test_noise_is_drawn_for_each_seed_and_its_graph_is_its_own(finished: Checkout):
    features = (finished.folder / "processed/shop/features/image").glob("*.parquet")
    by_seed = {path.stem.partition("-gaussian-")[2]: path for path in features}
    assert sorted(by_seed) == ["", "1", "2"]
    real, first, second = (read_features(by_seed[seed]) for seed in ("", "1", "2"))
    for drawn in (first, second):
        assert drawn.status.tolist() == real.status.tolist()
        lengths = [np.linalg.norm(x.embedding, axis=1) for x in (drawn, real)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert (first.embedding != second.embedding).any()
    graphs = sorted((finished.folder / "processed/shop/similarity").glob("*.parquet"))
    assert len(graphs) == 3
    tables = [pq.read_table(path) for path in graphs]
    assert not any(tables[0].equals(other) for other in tables[1:])


def test_nothing_new_runs_nothing_and_only_new_cells_run(finished: Checkout, tmp_path: Path):
    checkout = finished.clone(tmp_path / "copy")
    assert checkout.planned(PAGE) == {}
    of_ease = {"train_item_weights": 1, "evaluate_item_weights": 1}
    for changed, jobs in (
        (config((0.5, 0.9)), {"train": 2, "evaluate": 2}),
        (config((0.9,), (1, 2, 3)), {"control": 1, "similarity": 1, "train": 2, "evaluate": 2}),
        (config((0.9,), (1, 2), "lightgcn"), {"train": 2, "evaluate": 2}),
        (config((0.9,), (1, 2), "shuffled"), {"control": 2, "similarity": 2, "train": 2, "evaluate": 2}),
        (config((0.9,), (2,)), {}),
        # A further split needs no features and no graphs; the first one is there.
        (on_splits(config(), 2), {"repeat_split": 1, "train": 4, "evaluate": 4} | of_ease),
    ):
        checkout.configure(changed)
        assert checkout.planned(PAGE) == jobs | AFTER
    several = config((0.5, 0.9))
    several["studies"]["repeated"] = {"experiments": ["ease"], "seeds": [1], "split": {"repeats": 2}}
    checkout.configure(several)
    checkout.run(PAGE, "results/repeated/comparison.html")
    repeated = read(checkout, "results/repeated/comparison.json")
    assert repeated["settings"]["splits"] == [42, 43] and repeated["experiments"]["ease"]["metrics"]["recall@10"]["sd"]
    comparison = read(checkout, "results/compared/comparison.json")
    assert {c["point"].get("model.gamma") for c in comparison["cells"] if c["experiment"] == "shop"} == {0.5, 0.9}
    points = {
        (c["point"]["model.gamma"], c["seed"]): c["run"] for c in comparison["cells"] if c["experiment"] == "shop"
    }
    valid = {
        gamma: np.mean(
            [read(checkout, f"results/shop/runs/{points[gamma, s]}/train.stage.json")["best_valid"] for s in (1, 2)]
        )
        for gamma in (0.5, 0.9)
    }
    assert comparison["experiments"]["shop"]["point"] == {"model.gamma": max(valid, key=lambda gamma: valid[gamma])}
    checkout.configure(config())
    assert checkout.planned(PAGE) == AFTER


def test_a_cell_is_made_again_by_the_command_beside_it(finished: Checkout, tmp_path: Path):
    checkout = finished.clone(tmp_path / "copy")
    cell = read(checkout, "results/compared/comparison.json")["cells"][0]
    folder = f"results/{cell['experiment']}/runs/{cell['run']}"
    before = {name: (checkout.folder / folder / name).read_bytes() for name in ("evaluation.json", "per_user.parquet")}
    shutil.rmtree(checkout.folder / folder)
    *_, target = shlex.split(cell["command"])
    checkout.run(target)
    assert {name: (checkout.folder / folder / name).read_bytes() for name in before} == before


def test_equal_settings_are_trained_once_wherever_their_training_is(finished: Checkout, tmp_path: Path):
    checkout = finished.clone(tmp_path / "copy")
    whole = config()
    whole["experiments"] = {"twin": {"like": "ease"}, **whole["experiments"]}
    whole["studies"]["compared"]["experiments"].append("twin")
    checkout.configure(whole)
    assert checkout.planned(PAGE) == {"evaluate_item_weights": 1} | AFTER
    # The job that lists the runs reads the Snakefile again. The record is absent then if the training is being repeated.
    run = read(checkout, "results/compared/comparison.json")["cells"][-1]["run"]
    record = f"results/ease/runs/{run}/train.stage.json"
    reread = "if not is_main_process(workflow):\n"
    checkout.edit("workflow/rules/common.smk", reread, f"{reread}    Path('{record}').unlink()\n")
    (checkout.folder / PAGE).unlink()
    checkout.run("results/compared/cells.json")
    assert not (checkout.folder / record).exists()
    assert read(checkout, "results/compared/cells.json")["inputs"][f"train.twin.{run}"] == record


def test_a_run_that_the_config_does_not_ask_for_is_refused(finished: Checkout):
    output = finished.run("-n", f"results/shop/runs/{'0' * 12}/evaluation.json", check=False)
    assert "a run of other settings cannot be made from it" in output


def test_an_experiment_of_a_study_is_published_like_any_other(finished: Checkout, tmp_path: Path):
    checkout = finished.clone(tmp_path / "copy")
    assert checkout.planned("results/ease/metrics.json") == {"publish_item_weights": 1}
    assert checkout.planned("results/shop/metrics.json") == {"train": 1, "evaluate": 1, "publish": 1}
    output = checkout.run("results/ease/metrics.json", "results/noise/report.html")
    assert "ease: ease on shop (no features)" in output
    assert "noise: CM3 on shop (image looks as gaussian)" in output
    metrics = read(checkout, "results/ease/metrics.json")
    assert metrics["config"]["model"] == {"name": "ease", "l2": 100.0, "max_items": 25000}
    assert metrics["coverage"] == {}
    assert read(checkout, "results/noise/metrics.json")["config"]["control"] == {"image": "gaussian"}
    assert (checkout.folder / "results/noise/report.html").stat().st_size > 10_000
