"""Re-ranking in the plan: the runs that it reads, its key, and what is refused."""

import copy
from typing import Any

import pytest

from cm3.common.errors import UserError
from workflow.plan import publish, runs
from workflow.plan.config import Config, load_config

CONFIG: dict[str, Any] = {
    "datasets": {"shop": {"source": "sample"}, "other": {"source": "sample", "seed": 2}},
    "extractors": {"looks": {"modality": "image", "backend": "descriptor"}},
    "experiments": {
        "cm3": {"dataset": "shop", "modalities": {"image": "looks"}, "training": {"seed": 7}},
        "ease": {"dataset": "shop", "model": {"name": "ease"}},
        "elsewhere": {"dataset": "other", "model": {"name": "ease"}},
        "both": {"like": "cm3", "model": {"name": "rerank", "of": "cm3", "by": ["ease"]}},
    },
    "studies": {"study": {"experiments": ["cm3", "both"], "seeds": [1, 7]}},
}


def configured(**changes: Any) -> Config:
    """The configuration with other settings of the re-ranking's model."""
    raw = copy.deepcopy(CONFIG)
    raw["experiments"]["both"]["model"] |= changes
    return load_config(raw)


def test_it_reads_the_runs_of_the_experiments_that_it_names():
    config = configured()
    run = runs.selected_run(config, "both")
    cm3, ease = (runs.run_folder(config, name) for name in ("cm3", "ease"))
    inputs = runs.train_inputs(config, "both", run)
    assert inputs["cm3.user_embeddings"] == f"{cm3}/user_embeddings.parquet"
    assert inputs["cm3.item_embeddings"] == f"{cm3}/item_embeddings.parquet"
    assert inputs["ease.weights"] == f"{ease}/model.safetensors"
    assert not any(name.startswith(("features", "similarity")) for name in inputs)
    assert runs.evaluate_inputs(config, "both", run)["rerank"] == f"results/both/runs/{run}/model.json"
    assert publish.publish_inputs(config, "both")["model"] == f"results/both/runs/{run}/model.json"


def test_in_a_study_its_experiments_have_its_seed():
    config = configured()
    for _, seed, settings in config.studies["study"].settings("both"):
        run = runs.run_key(config, settings)
        base = runs.run_key(config, config.experiments["cm3"].with_seed(seed))
        assert runs.train_inputs(config, "both", run)["cm3.user_embeddings"].split("/")[3] == base
        assert base in runs.runs_of(config, "cm3")
    assert len(runs.runs_of(config, "both")) == 2


def test_a_reranking_alone_asks_for_seeds_of_its_experiments():
    raw = copy.deepcopy(CONFIG)
    raw["studies"]["study"]["experiments"] = ["both", "ease"]
    config = load_config(raw)
    assert len(runs.runs_of(config, "cm3")) == 2
    assert len(runs.runs_of(config, "ease")) == 1


def test_its_key_follows_what_it_combines():
    first = runs.selected_run(configured(), "both")
    assert runs.selected_run(configured(top=100), "both") != first
    assert runs.selected_run(configured(weights={"ease": 0.5}), "both") != first
    raw = copy.deepcopy(CONFIG)
    raw["experiments"]["ease"]["model"]["l2"] = 5
    assert runs.selected_run(load_config(raw), "both") != first
    raw = copy.deepcopy(CONFIG)
    raw["experiments"]["both"]["evaluation"] = {"ks": [3, 10, 20]}
    assert runs.selected_run(load_config(raw), "both") == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "cm4"}, r"experiments\.both\.model\.of = 'cm4': no such name \(did you mean 'cm3'"),
        ({"by": ["both"]}, r"experiments\.both\.model\.by = 'both': has lists and no scores"),
        ({"by": ["elsewhere"]}, r"model\.by = 'elsewhere': is on dataset 'other', but both on 'shop'"),
        ({"by": ["ease", "ease"]}, r"'ease' is given twice"),
        ({"by": ["cm3"]}, r"'cm3' is given twice"),
        ({"by": []}, r"model\.by"),
        ({"weights": {"cm3": 1}}, r"weights\.cm3: not one of by"),
        ({"weights": {"ease": -1}}, r"model\.weights\.ease"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        configured(**changes)
