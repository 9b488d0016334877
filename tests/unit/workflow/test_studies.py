"""Studies: what is refused, which runs they expand to, and which keys those have."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from checkout import SMALL
from study_config import checked, compared_runs, config, refused

from cm3.common.errors import UserError
from cm3.common.strict import validate
from cm3.model_registry import spec_classes
from cm3.reports.analysis.spec import StudySpec, check_study
from extractors.control import CONTROLS
from workflow.plan import comparison, publish
from workflow.plan.config import load_config
from workflow.plan.experiments import Kind
from workflow.plan.runs import features_of, runs_of, selected_run, train, train_inputs, train_module
from workflow.plan.storage import root_of


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"experiments": []}, r"studies\.compared\.experiments = \[\].*at least 1"),
        ({}, r"studies\.compared\.experiments: required"),
        ({"experiments": ["shop"], "sedes": [1]}, r"studies\.compared\.sedes: unknown key \(did you mean 'seeds'\?\)"),
        ({"experiments": ["shop", "nois"]}, r"compared\.experiments = 'nois': no such name \(did you mean 'noise'\?\)"),
        ({"experiments": ["shop", "shop"]}, r"compared\.experiments.*duplicate value: 'shop'"),
        ({"experiments": ["shop"], "seeds": []}, r"compared\.seeds = \[\].*at least 1"),
        ({"experiments": ["shop"], "seeds": [1, 1]}, r"compared\.seeds.*duplicate value: 1"),
        ({"experiments": ["shop"], "seeds": [-1]}, r"compared\.seeds\.0 = -1"),
        ({"experiments": ["shop"], "reference": "ease"}, r"compared\.reference: the study has no experiment 'ease'"),
        ({"experiments": ["shop"], "metrics": ["recal@5"]}, r"compared\.metrics = 'recal@5'.*did you mean 'recall@5'"),
        (
            {"experiments": ["shop"], "metrics": ["recall@20"]},
            r"compared\.metrics = 'recall@20': not a metric of all",
        ),
        ({"experiments": ["shop"], "grids": {"ease": {}}}, r"compared\.grids\.ease: the study has no experiment"),
        ({"experiments": ["shop"], "grids": {"shop": {"model.gamma": []}}}, r"grids\.shop\.model\.gamma = \[\]"),
    ],
)
def test_a_wrong_study_is_refused_with_its_path_value_and_the_nearest_name(study: dict[str, Any], message: str):
    assert re.search(message, refused(config(study)))


@pytest.mark.parametrize(
    ("experiment", "grid", "message"),
    [
        (
            "shop",
            {"model.gama": [1]},
            r"grids\.shop\.model\.gama: unknown key of cm3 \(did you mean 'model\.gamma'\?\)",
        ),
        (
            "shop",
            {"modl.gamma": [1]},
            r"grids\.shop\.modl\.gamma: unknown key; a grid's keys are.*did you mean 'model'",
        ),
        ("shop", {"gamma": [1]}, r"grids\.shop\.gamma: unknown key; a grid's keys are model\.KEY or training\.KEY"),
        (
            "shop",
            {"model.n_layers": [1]},
            r"model\.n_layers: unknown key of cm3 \(did you mean 'model\.n_ui_layers'\?\)",
        ),
        ("shop", {"model.gamma": [0.5, -1]}, r"grids\.shop\.model\.gamma = -1: Input should be greater than or equal"),
        ("shop", {"model.gamma": [0.5, "much"]}, r"grids\.shop\.model\.gamma = 'much'"),
        ("shop", {"model.gamma": [1, 1.0]}, r"grids\.shop: duplicate grid point"),
        ("shop", {"model.min_sim": [0.1, 0.9], "model.max_sim": [0.5]}, r"min_sim 0\.9 is above max_sim 0\.5"),
        ("shop", {"model.modality_weights": [{"text": 1}]}, r"modality_weights: modality 'image' has no weight"),
        ("shop", {"training.seed": [1]}, r"training\.seed: seeds are not chosen by validation"),
        (
            "shop",
            {"training.monitor": ["ndcg@5"]},
            r"training\.monitor: grid points are chosen by the monitored metric",
        ),
        ("shop", {"training.device": ["cpu"]}, r"training\.device: changes speed only"),
        ("lightgcn", {"model.name": ["ease"]}, r"model\.name: another model is another experiment"),
        ("lightgcn", {"model.gamma": [1]}, r"model\.gamma: unknown key of lightgcn"),
        ("ease", {"training.lr": [0.1]}, r"training\.lr: ease is computed in closed form and does not train"),
        ("ease", {"model.l2": [0]}, r"model\.l2 = 0: Input should be greater than 0"),
    ],
)
def test_a_wrong_grid_is_refused(experiment: str, grid: dict[str, Any], message: str):
    told = refused(config({"experiments": [experiment], "grids": {experiment: grid}}))
    assert re.search(message, told), told
    assert len(told.splitlines()) == 1


def test_experiments_that_cannot_be_compared_are_refused():
    other = {"dataset": "other", "modalities": {"text": "words"}}
    whole = config({"experiments": ["shop", "elsewhere"]}, elsewhere=other)
    whole["datasets"]["other"] = {"source": "sample", "users": 100, "items": 50}
    assert "shop has dataset 'shop' and elsewhere 'other'" in refused(whole)
    for evaluation in ({"score": "cosine"}, {"mask": "train+valid"}, {"top_n": 7}):
        (key,) = evaluation
        told = refused(config({"experiments": ["shop", "odd"]}, odd={"like": "shop", "evaluation": evaluation}))
        assert f"evaluation.{key}" in told
    told = refused(config({"experiments": ["shop", "odd"]}, odd={"like": "shop", "evaluation": {"ks": [3]}}))
    assert "no common cut-off in evaluation.ks" in told
    whole = config({"experiments": ["shop"], "metrics": ["recall@10"]})
    whole["experiments"]["shop"]["evaluation"]["top_n"] = 7
    assert "compared.metrics = 'recall@10': not a metric of all its experiments" in refused(whole)


def test_a_study_and_an_experiment_do_not_share_a_name():
    whole = config()
    whole["studies"] = {"shop": {"experiments": ["shop"]}}
    assert "studies.shop: an experiment has the same name" in refused(whole)


def test_faults_of_an_experiment_are_told_once_and_not_again_for_its_study():
    told = refused(config({"experiments": ["shop", "odd"]}, odd={"like": "shop", "model": {"gama": 1}}))
    assert told == "experiments.odd.model.gama: unknown key (did you mean 'gamma'?)"


def test_commands_name_the_config_files_and_do_not_decide_what_is_rerun():
    study = {"experiments": ["shop", "ease"], "seeds": [1]}
    plain = checked(study)
    elsewhere = load_config(config(study), [Path.cwd() / "config/my shop.yaml", Path("/lab/more.yaml")])
    head = "snakemake --cores 8 --configfile 'config/my shop.yaml' /lab/more.yaml -- results/"
    told = comparison.compare(elsewhere, "compared").spec
    assert told["command"] == head + "compared/comparison.json"
    assert all(entry["command"].startswith(head) for entry in told["cells"])
    assert publish.publish(elsewhere, "shop").spec["command"] == head + "shop/metrics.json"
    assert publish.publish(plain, "shop").spec["command"] == "snakemake --cores 8 results/shop/metrics.json"
    assert comparison.compare(elsewhere, "compared").identity == comparison.compare(plain, "compared").identity
    assert publish.publish(elsewhere, "shop").identity == publish.publish(plain, "shop").identity


def test_a_study_is_every_experiment_at_every_point_and_seed():
    grid = {"model.gamma": [0.5, 1], "training.lr": [0.001, "1e-2"]}
    found = compared_runs(checked({"experiments": ["shop", "lightgcn"], "seeds": [4, 5, 6], "grids": {"shop": grid}}))
    assert [c["experiment"] for c in found] == ["shop"] * 12 + ["lightgcn"] * 3
    points = [{"model.gamma": g, "training.lr": r} for g in (0.5, 1.0) for r in (0.001, 0.01)]
    assert [c["point"] for c in found] == [point for point in points for _ in range(3)] + [{}] * 3
    assert [c["seed"] for c in found] == [4, 5, 6] * 5
    assert len({c["run"] for c in found}) == 15
    assert all(c["command"].endswith(f"results/{c['experiment']}/runs/{c['run']}/evaluation.json") for c in found)


def test_five_seeds_are_the_default():
    assert [c["seed"] for c in compared_runs(checked({"experiments": ["shop"]}))] == [1, 2, 3, 4, 5]


def test_the_order_of_grid_keys_means_nothing():
    grid = {"model.gamma": [0.5, 0.9], "model.alpha": [0.1, 0.2]}
    study = {"experiments": ["shop"], "grids": {"shop": grid}}
    turned = {"experiments": ["shop"], "grids": {"shop": dict(reversed(grid.items()))}}
    assert (
        comparison.compare(checked(study), "compared").identity
        == comparison.compare(checked(turned), "compared").identity
    )


def keys(study: dict[str, Any]) -> set[tuple[str, str]]:
    return {(c["experiment"], c["run"]) for c in compared_runs(checked(study))}


def test_adding_a_value_a_seed_or_an_experiment_adds_runs_and_changes_none():
    study: dict[str, Any] = {"experiments": ["shop"], "seeds": [1, 2], "grids": {"shop": {"model.gamma": [0.5, 0.9]}}}
    before = keys(study)
    assert len(before) == 4
    for change, added in (
        ({"grids": {"shop": {"model.gamma": [0.1, 0.5, 0.9]}}}, 2),
        ({"seeds": [1, 7, 2]}, 2),
        ({"experiments": ["ease", "shop"]}, 1),
    ):
        after = keys(study | change)
        assert before < after
        assert len(after - before) == added


def test_equal_settings_are_one_run_whichever_study_or_experiment_has_them():
    study = {"experiments": ["shop"], "seeds": [7], "grids": {"shop": {"model.gamma": [0.3]}}}
    training = {**SMALL["experiments"]["shop"]["training"], "seed": 7}
    same = checked(study, same={"like": "shop", "model": {"gamma": 0.3}, "training": training})
    (entry,) = compared_runs(same)
    assert entry["run"] == selected_run(same, "same")
    own, of_study = train(same, "same", entry["run"]), train(same, "shop", entry["run"])
    assert own == of_study


def test_the_selected_run_belongs_to_the_study_at_its_seed():
    study = {"experiments": ["shop"], "seeds": [41, 42, 43]}
    found = checked(study)
    assert selected_run(found, "shop") == selected_run(checked(), "shop")
    assert selected_run(found, "shop") in {c["run"] for c in compared_runs(found)}
    assert len(runs_of(found, "shop")) == 3


def test_a_run_that_the_config_does_not_ask_for_is_refused():
    found = checked({"experiments": ["shop"], "seeds": [1, 2]})
    with pytest.raises(
        UserError, match=f"configuration selects run {selected_run(found, 'shop')} and 2 others for studies"
    ):
        train_inputs(found, "shop", "0" * 12)


def test_a_closed_form_is_one_run_for_all_seeds_unless_its_content_is_drawn():
    names = ["ease", "content", "drawn"]
    found = checked(
        {"experiments": names, "seeds": [1, 2, 3]}, drawn={"like": "content", "control": {"image": "gaussian"}}
    )
    runs = {name: {c["run"] for c in compared_runs(found) if c["experiment"] == name} for name in names}
    assert {name: len(keys) for name, keys in runs.items()} == {"ease": 1, "content": 1, "drawn": 3}


def test_a_control_has_its_own_features_graphs_and_key_and_follows_the_seed():
    found = checked(
        {"experiments": ["shop", "noise"], "seeds": [1]},
        flat={"like": "shop", "control": {"text": "constant"}},
        mixed={"like": "shop", "control": {"text": "shuffled"}},
    )
    assert len({selected_run(found, name) for name in ("shop", "noise", "flat", "mixed")}) == 4
    run = selected_run(found, "noise")
    paths = train_inputs(found, "noise", run)
    real = train_inputs(found, "shop", selected_run(found, "shop"))
    for modality in ("text", "image"):
        features = real[f"features.{modality}"].removesuffix(".parquet")
        assert paths[f"features.{modality}"] == f"{features}-gaussian-42.parquet"
        assert Path(paths[f"similarity.{modality}"]).stem == f"{Path(features).name}-gaussian-42-k10"
    (entry,) = (c for c in compared_runs(found) if c["experiment"] == "noise")
    assert "-gaussian-1.parquet" in train_inputs(found, "noise", entry["run"])["features.text"]
    flat = train_inputs(found, "flat", selected_run(found, "flat"))
    assert flat["features.text"].endswith("-constant.parquet")
    assert flat["features.image"] == real["features.image"]


def test_the_comparison_knows_whose_control_an_experiment_is():
    noise = {"like": "shop", "control": "shuffled", "evaluation": {"ks": [5]}}
    study = {"experiments": ["noise", "shop", "lightgcn", "shuffled", "narrow"]}
    narrow = {"like": "shop", "control": "gaussian", "modalities": {"text": "words"}}
    spec = comparison.compare(checked(study, shuffled=noise, narrow=narrow), "compared").spec
    told = {name: (e["control"], e["control_of"]) for name, e in spec["experiments"].items()}
    assert told == {
        "noise": ({"text": "gaussian", "image": "gaussian"}, "shop"),
        "shop": (None, None),
        "lightgcn": (None, None),
        "shuffled": ({"text": "shuffled", "image": "shuffled"}, "shop"),
        "narrow": ({"text": "gaussian"}, None),
    }
    assert spec["metrics"] == ["recall@5", "ndcg@5"]


SPECS = {name: spec for name, spec in spec_classes().items() if spec.exports != "lists"}


def test_each_model_gets_its_inputs_its_stage_and_its_version():
    modalities = {"text": "words"}
    trained = {name: spec for name, spec in SPECS.items() if spec.exports != "lists"}
    sections = {
        f"of-{name}": {
            "dataset": "shop",
            "model": {"name": name},
            "modalities": modalities if SPECS[name].reads_features else {},
        }
        for name in trained
    }
    found = checked(**sections)
    versions = {}
    for name in trained:
        experiment = f"of-{name}"
        run = selected_run(found, experiment)
        inputs = train_inputs(found, experiment, run)
        assert ("features.text" in inputs) == SPECS[name].reads_features
        assert ("similarity.text" in inputs) == SPECS[name].reads_item_graphs
        assert train_module(found, experiment) == ("cm3.training.train" if name == "cm3" else "cm3.baselines.train")
        task = train(found, experiment, run)
        assert task.spec["model"].get("name", "cm3") == name
        versions[name] = task.version
        published = publish.publish_inputs(found, experiment)
        assert ("user_embeddings" in published) == ("history" in published) == (SPECS[name].exports == "embeddings")
    assert len(set(versions.values())) == len(trained)
    assert {name for name, spec in SPECS.items() if spec.exports == "item_weights"} >= {
        "itemknn",
        "itemknn-content",
        "ease",
    }


def test_the_config_knows_the_controls_that_there_are():
    assert set(get_args(Kind)) == set(CONTROLS)


def test_the_comparison_reads_the_files_of_each_run_of_the_study():
    found = checked({"experiments": ["shop", "ease"], "seeds": [1, 2]})
    inputs = comparison.compare_inputs(found, "compared")
    for entry in compared_runs(found):
        name, run = entry["experiment"], entry["run"]
        folder = f"results/{name}/runs/{run}"
        assert inputs[f"evaluation.{name}.{run}"] == f"{folder}/evaluation.json"
        assert inputs[f"train.{name}.{run}"] == f"{folder}/train.stage.json"
        assert (f"user_embeddings.{name}.{run}" in inputs) == (name == "shop")
    check_study(validate(StudySpec, comparison.compare(found, "compared").spec, "study"))
    assert comparison.compare_call(found, "compared")["inputs"] == inputs


def test_the_comparison_reads_the_features_of_the_first_experiment_with_content():
    noisy = {"like": "content", "control": "gaussian"}
    found = checked({"experiments": ["ease", "noisy", "content"]}, noisy=noisy)
    features = {n: p for n, p in comparison.compare_inputs(found, "compared").items() if n.startswith("features.")}
    run = runs_of(found, "content")[selected_run(found, "content")]
    assert features and features == {f"features.{m}": path for m, path in features_of(found, run).items()}
    without = comparison.compare_inputs(checked({"experiments": ["ease", "noisy"]}, noisy=noisy), "compared")
    assert not any(name.startswith("features.") for name in without)


def test_files_in_a_storage_lie_below_one_root():
    planned = {"items_": "processed/shop/items.parquet", "evaluation.shop.1": "results/shop/runs/1/evaluation.json"}
    assert root_of(planned | {"call": "elsewhere.json"}, planned) == "."
    stored = {name: f".snakemake/storage/s3/bucket/{path}" for name, path in planned.items()}
    assert root_of(stored, planned) == ".snakemake/storage/s3/bucket/"
    with pytest.raises(UserError, match=r"results/shop/runs/1/evaluation\.json.*one storage"):
        root_of(stored | {"evaluation.shop.1": planned["evaluation.shop.1"]}, planned)
    with pytest.raises(UserError, match=r"items\.parquet.*one storage"):
        root_of(stored | {"items_": "somewhere/else"}, planned)


def test_the_comparison_knows_which_models_depend_on_the_seed_and_how_their_settings_differ():
    mean = {"like": "shop", "model": {"fusion": "mean"}}
    noisy = {"like": "content", "control": "gaussian"}
    settings = checked({"experiments": ["shop", "mean", "ease", "content", "noisy"]}, mean=mean, noisy=noisy)
    experiments = comparison.compare(settings, "compared").spec["experiments"]
    fixed = {name: one["deterministic"] for name, one in experiments.items()}
    assert fixed == {"shop": False, "mean": False, "ease": True, "content": True, "noisy": False}, "noise has a seed"
    whole, other = experiments["shop"]["settings"], experiments["mean"]["settings"]
    assert {key for key in whole if whole[key] != other[key]} == {"model.fusion"}
    assert "training.lr" in whole and "training.seed" not in whole
