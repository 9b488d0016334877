"""Targets of the command line: the nearest name for a mistyped one, and the list of names; `./run list`."""

import copy
from pathlib import Path
from typing import Any

import pytest
from checkout import SMALL

from cm3.common.files import write_json
from cm3.common.ledger import Ledger
from workflow.overview import overview
from workflow.plan.config import Config, load_config
from workflow.plan.publish import publish, run_command
from workflow.summary import next_steps, study_summary, summary
from workflow.targets import names_in, unknown_target


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config() -> Config:
    raw = copy.deepcopy(SMALL)
    raw["experiments"]["ease"] = {"like": "shop", "model": {"name": "ease"}, "modalities": {}}
    raw["studies"] = {"shop-study": {"experiments": ["shop", "ease"], "seeds": [1]}}
    return load_config(raw)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/shpo/metrics.json", "shpo: no such experiment or study (did you mean 'shop'?)"),
        ("results/shop/metric.json", "did you mean 'results/shop/metrics.json'?"),
        ("result/shop/metrics.json", "did you mean 'results/shop/metrics.json'?"),
        ("shop", "shop: no such target (did you mean 'shop'?)"),
        ("results/shop-study/metrics.json", "shop-study is a study, not an experiment: ./run study shop-study"),
        ("results/shop/comparison.html", "shop is an experiment, not a study: ./run report shop"),
    ],
)
def test_a_mistyped_target_gives_the_nearest_name(config: Config, target: str, message: str):
    assert message in (unknown_target(config, [target]) or "")


def test_a_name_that_resembles_none_gives_the_list(config: Config):
    found = unknown_target(config, ["results/zzz/metrics.json"])
    assert found == "zzz: no such experiment or study\nexperiments: shop, ease\nstudies: shop-study"


def test_right_targets_are_not_blamed(config: Config):
    right = ["results/shop/metrics.json", "results/shop-study/comparison.html", "processed/shop/items.parquet"]
    assert unknown_target(config, right) is None
    assert names_in(config, right) == ["shop", "shop-study"]


def test_the_list_says_which_results_are_up_to_date(config: Config):
    write_json(Path("results/shop/metrics.json"), {})
    write_json(Path("results/ease/metrics.json"), {})
    Ledger().record("results/shop/metrics.json", publish(config, "shop").identity)
    Ledger().record("results/ease/metrics.json", "settings of another day")
    rows = {line.split()[0]: line for line in overview(config).splitlines() if line}
    assert rows["shop"].endswith("done") and rows["ease"].endswith("other settings")
    assert rows["shop-study"].split() == ["shop-study", "2", "-"]
    assert "./run study NAME" in overview(config)


def test_after_a_run_the_next_commands_are_named(config: Config):
    steps = "\n".join(next_steps(config, "shop", [Path("results/shop/metrics.json")]))
    assert "./run report shop" in steps and "./run study shop-study" in steps
    steps = "\n".join(next_steps(config, "shop", [Path("results/shop/report.html")]))
    assert "open  results/shop/report.html" in steps and "./run report" not in steps


def test_commands_name_the_configuration(folder: Path):
    raw = copy.deepcopy(SMALL)
    words = "experiments={shop: {training: {lr: 0.002}}}"
    (folder / "mine.yaml").write_text("{}")
    config = load_config(raw, [folder / "mine.yaml"], overrides=[words])
    assert run_command(config, "report", "shop") == f"./run report shop --configfile mine.yaml --config '{words}'"


def test_the_table_of_a_study_has_the_best_model_first(folder: Path):
    rows = ["experiment,slice,metric,seeds,mean,low"]
    rows += ["ease,all,recall@20,1,0.1,0.05", "shop,all,recall@20,1,0.2,0.1", "shop,cold,recall@20,1,0.9,"]
    rows += ["shop,all,seconds,1,33,"]
    (folder / "comparison.csv").write_text("\n".join(rows) + "\n")
    lines = study_summary(folder / "comparison.csv", "shop-study", [Path("results/shop-study/comparison.html")])
    assert [line.split() for line in lines[2:5]] == [
        ["seeds", "recall@20"],
        ["shop", "1", "0.2000"],
        ["ease", "1", "0.1000"],
    ]
    assert lines[1] == "shop-study: test metrics"
    assert lines[-1] == "  results/shop-study/comparison.html"
    with_splits = [f"{row},{'splits' if row == rows[0] else 3}" for row in rows]
    (folder / "comparison.csv").write_text("\n".join(with_splits) + "\n")
    assert (
        study_summary(folder / "comparison.csv", "shop-study", [])[1] == "shop-study: test metrics over 3 random splits"
    )


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"modalities": {"text": "words"}}, "best: CM3 on shop (text minilm)"),
        ({"model": {"name": "ease"}}, "best: ease on shop (no features)"),
        (
            {"model": {"name": "rerank"}, "rerank": {"of": "cm3", "weights": {"ease": 0.3, "knn": 0.0}}},
            "best: rerank on shop (cm3 and ease, knn)",
        ),
    ],
)
def test_the_table_of_an_experiment_names_what_it_is_made_of(changes: dict[str, Any], title: str):
    config = {"modalities": {}, "model": {"name": "cm3"}, "extractors": {"text": {"name": "minilm"}}}
    config |= {key: value for key, value in changes.items() if key != "rerank"}
    metrics = {"experiment": "best", "dataset": "shop", "test": {"recall@20": 0.25}, "config": config}
    metrics |= {key: value for key, value in changes.items() if key == "rerank"}
    lines = summary(metrics, Path("results/best")).splitlines()
    assert lines[0] == title and lines[2].split() == ["recall", "0.2500"]
