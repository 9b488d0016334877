"""The tasks of rendering pages: which settings are marked, and which models of studies are shown."""

import yaml
from repository import ROOT
from study_config import checked

from workflow.plan import pages
from workflow.plan.config import load_config
from workflow.plan.runs import run_key


def test_settings_are_marked_where_they_differ_from_the_defaults_of_the_model():
    tuned = {
        "like": "shop",
        "model": {"gamma": 0.5},
        "training": {"lr": 0.01, "patience": 7, "device": "cpu"},
        "evaluation": {"ks": [5]},
    }
    own = set(pages.changed_settings(checked(tuned=tuned), "tuned"))
    assert {"model.gamma", "training.lr", "training.patience", "evaluation.ks"} <= own
    assert not {"training.device", "model.alpha", "training.seed", "split.seed"} & own
    config = load_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    assert pages.changed_settings(config, "gift-cards-2018") == []
    assert pages.changed_settings(config, "baby") == [], "the size that is checked is no setting"
    assert pages.changed_settings(config, "sample-ease") == ["evaluation.ks"]
    for name in config.experiments:
        pages.experiment_page(config, name)


def test_pages_that_exist_are_brought_up_to_date_with_the_results_next_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = checked({"experiments": ["shop", "ease"]})
    for page in ("shop/report.html", "compared/comparison.html", "unknown/report.html", "shop/runs/0/report.html"):
        (tmp_path / "results" / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / page).touch()

    def added(*targets):
        return pages.existing_pages(config, targets)

    assert added("results/shop/metrics.json", "results/ease/metrics.json") == ["results/shop/report.html"]
    assert added(str(tmp_path / "results/shop/model.safetensors")) == ["results/shop/report.html"]
    assert added("results/compared/comparison.json") == ["results/compared/comparison.html"]
    assert added("results/shop/report.html", "results/unknown/metrics.json", "prepare") == []
    assert added("results/shop/runs/0/evaluation.json", "all") == []


def test_entries_of_the_report_say_what_they_are():
    config = checked({"experiments": ["shop", "ease"]})
    assert pages.experiment_labels(config, "ease") == {
        "experiment": "ease",
        "model": "ease",
        "dataset": "shop",
        "features": "none",
    }
    assert pages.experiment_labels(config, "shop")["features"] == "words, looks"
    assert pages.study_labels(config, "compared") == {"study": "compared", "dataset": "shop", "experiments": "2"}


def test_a_change_of_what_is_marked_renders_the_page_again_and_a_study_does_not():
    config = checked(tuned={"like": "shop", "model": {"gamma": 0.5}})
    assert pages.experiment_page(config, "shop").identity != pages.experiment_page(config, "tuned").identity
    compared = checked({"experiments": ["shop", "ease", "noise"], "seeds": [1, 2]})
    task = pages.experiment_page(compared, "shop")
    assert task.identity == pages.experiment_page(config, "shop").identity
    ease = run_key(compared, compared.experiments["ease"])
    assert task.runtime["studies"] == {"compared": {"ease": [ease]}}, "neither itself nor its control"
    assert all("comparison" not in path for path in pages.experiment_page_inputs(compared, "shop").values())
