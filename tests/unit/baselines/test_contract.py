"""The contract of every baseline: it learns, is restored from its files, repeats itself, resumes and checks its input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import baseline_shop as small
import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_shop import one_thread, prepared  # noqa: F401

from cm3.baselines.base import parse_baseline
from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.stages import STAGES
from cm3.evaluation.ranking import Ranking
from cm3.model_registry import spec_classes
from cm3.training.checkpoint import Checkpoint

BASELINES = small.BASELINES
TRAINED = [name for name, spec in BASELINES.items() if spec.trains]
FEW = {"epochs": 3}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, Path]:
    return prepared(tmp_path_factory.mktemp("shop"), n_users=120, n_items=50, per_user=10)


@pytest.fixture(scope="module")
def fitted(shop, tmp_path_factory):
    """Each model, fitted once: its folder, facts, test metrics and recommendations."""
    done = {}

    def of(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name) / "run"
            facts = small.fit(shop, folder, name)
            done[name] = (folder, facts, *small.scored(shop, folder, name))
        return done[name]

    return of


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "mostpop"])
def test_it_beats_the_most_popular_items(fitted, name):
    _, facts, test, _ = fitted(name)
    _, popular_facts, popular, _ = fitted("mostpop")
    assert test["ndcg@10"] > 1.2 * popular["ndcg@10"]
    assert facts["best_valid"] > popular_facts["best_valid"]


@pytest.mark.parametrize("name", BASELINES)
def test_its_files_rank_like_the_model_in_memory(shop, fitted, name):
    folder, _, _, lists = fitted(name)
    data, inputs = small.read(shop, name)
    model = small.settings(name)
    if model.trains:
        network = model.network(inputs)
        network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        solution = network.embed()
    else:
        solution = model.solve(inputs, torch.device("cpu"))
    ranking = Ranking(np.arange(120), data.matrix("train"))
    if model.exports == "embeddings":
        best, _ = ranking.top(solution.users, solution.items, 10)
    else:
        best, _ = ranking.top_by(solution.scores(inputs.interactions), 10)
    assert lists == {f"user{u}": [f"item{i}" for i in row] for u, row in enumerate(best)}


@pytest.mark.parametrize("name", BASELINES)
def test_equal_seeds_give_equal_bytes_and_others_another_model(shop, tmp_path, name):
    global_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for folder, seed in (("a", 42), ("b", 42), ("c", 7)):
        small.fit(shop, tmp_path / folder, name, FEW | {"seed": seed})
    assert small.written(tmp_path / "a", name) == small.written(tmp_path / "b", name)
    first, other = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    same = all(torch.equal(first[key], other[key]) for key in first)
    assert same != BASELINES[name].trains
    assert torch.equal(torch.random.get_rng_state(), global_state[0]), "torch's global generator is left as it was"
    assert (np.random.get_state()[1] == global_state[1]).all()  # noqa: NPY002


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("name", TRAINED)
def test_it_resumes_after_a_stop_to_the_same_bytes(shop, tmp_path, monkeypatch, name):
    training = FEW | {"checkpoint_seconds": 0}
    small.fit(shop, tmp_path / "whole", name, training)
    save, stops, saves = Checkpoint.save, 0, 0

    def save_then_stop(self, tensors, state):
        nonlocal saves
        save(self, tensors, state)
        saves += 1
        if saves == 3:
            raise Stopped

    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    while True:
        saves = 0
        try:
            small.fit(shop, tmp_path / "stopped", name, training)
            break
        except Stopped:
            stops += 1
    assert stops >= 3, "it was stopped in the middle of epochs and between them"
    assert small.written(tmp_path / "stopped", name) == small.written(tmp_path / "whole", name)


@pytest.mark.parametrize("name", BASELINES)
def test_its_record_says_what_it_is(shop, fitted, name):
    _, facts, _, _ = fitted(name)
    assert facts["model"] == name and facts["monitor"] == "recall@10" and facts["seed"] == 42
    assert 0 < facts["best_valid"] <= 1 and facts["parameters"] > 0
    assert (facts["seconds_per_epoch"] is None) == (facts["epochs"] is None) == (not BASELINES[name].trains)
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("name", BASELINES)
def test_missing_or_unused_modalities_are_an_error(shop, tmp_path, monkeypatch, name):
    other = ("text",) if not BASELINES[name].reads_features else ()
    monkeypatch.setattr(small, "modalities", lambda _: other)
    expected = "remove the modalities text" if other else "name an extractor"
    with pytest.raises(UserError, match=f"model {name!r} reads .*{expected}"):
        small.fit(shop, tmp_path, name)


@pytest.mark.parametrize("name", BASELINES)
def test_unknown_settings_are_refused_with_the_nearest_name(name):
    with pytest.raises(UserError, match=r"model\.nam: unknown key \(did you mean 'name'\?\)"):
        parse_baseline({"name": name, "nam": 1})


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"model\.name = 'lightgnc': .*did you mean 'lightgcn'"):
        parse_baseline({"name": "lightgnc"})
    for data in ({}, {"name": "cm3"}):
        with pytest.raises(UserError, match=rf"model\.name = {data.get('name')!r}: not a baseline"):
            parse_baseline(data)


@pytest.mark.parametrize("name", ["freedom", "itemknn-content", "mm-gf", "lirdrec"])
def test_weights_of_other_modalities_are_refused(shop, tmp_path, name):
    with pytest.raises(UserError, match=r"modality_weights\.sound"):
        small.fit(shop, tmp_path, name, modality_weights={"text": 1.0, "sound": 1.0})
    with pytest.raises(UserError, match="at least one modality needs a weight"):
        small.settings(name, modality_weights={"text": 0.0, "image": 0.0})


@pytest.mark.parametrize("name", ["freedom", "mgcn", "lirdrec", "smore"])
def test_graphs_of_another_size_are_refused(shop, tmp_path, name):
    with pytest.raises(UserError, match="has 4 neighbours, but knn_k is 5"):
        small.fit(shop, tmp_path, name, knn_k=5)


@pytest.mark.parametrize("name", [name for name, spec in BASELINES.items() if spec.reads_features])
def test_items_without_vectors_are_taken(tmp_path, name):
    shop = prepared(tmp_path, n_users=120, n_items=50, per_user=10, missing={"text": [0, 3, 7], "image": [3, 9]})
    small.fit(shop, tmp_path / "run", name, FEW)
    assert small.scored(shop, tmp_path / "run", name)[0]["ndcg@10"] > 0


@pytest.mark.parametrize("name", BASELINES)
def test_data_without_a_validation_split_are_refused(tmp_path, name):
    users, items, split = (np.array(x) for x in ([0, 0, 1, 1], [0, 1, 1, 2], [0, 2, 0, 2]))
    (tmp_path / "data").mkdir()
    shop = prepared(tmp_path / "data")
    shop |= oracle.write_interactions(tmp_path / "data", users, items, split.astype(np.int8), 40, 30)
    with pytest.raises(UserError, match="no row is in the valid split"):
        small.fit(shop, tmp_path / "run", name)


@pytest.mark.parametrize("name", ["bpr-mf", "freedom"])
def test_a_user_who_has_everything_leaves_no_negative(tmp_path, name):
    users, items = np.array([0] * 30 + [1, 1]), np.array([*range(30), 0, 1])
    split = np.array([0] * 31 + [1], np.int8)
    shop = prepared(tmp_path)
    shop |= oracle.write_interactions(tmp_path, users, items, split, 40, 30)
    with pytest.raises(UserError, match=r"user 0 has interacted with all 30 items.*directau"):
        small.fit(shop, tmp_path / "run", name)
    small.fit(shop, tmp_path / "run", "directau", {"epochs": 1})


@pytest.mark.integration
def test_a_cosine_score_of_item_weights_is_an_error(shop, fitted, tmp_path):
    folder, _, _, _ = fitted("ease")
    command = evaluation(shop, {"weights": folder / "model.safetensors"}, tmp_path, {"score": "cosine"})
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "hold no embeddings; set score to dot" in done.stderr


def test_a_network_writes_curves_next_to_its_model(shop, tmp_path):
    small.fit(shop, tmp_path, "bpr-mf", FEW | {"tensorboard": True})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("training/loss")] == list(range(1, FEW["epochs"] + 1))


@pytest.mark.integration
@pytest.mark.parametrize("name", ["freedom", "itemknn"])
def test_the_command_line_does_the_same_as_the_functions(shop, tmp_path, name):
    names = small.modalities(name)
    training = small.TRAINING | FEW
    spec = {
        "modalities": names,
        "model": small.settings(name).identity(),
        "training": {k: v for k, v in training.items() if k != "device"},
    }
    outputs = {output.removesuffix("_output"): file for output, file in small.outputs(name).items()}
    outputs["record"] = "train.stage.json"
    command = [sys.executable, "-m", "cm3.baselines.train", "--spec", json.dumps(spec)]
    command += ["--runtime", json.dumps({"device": "cpu", "threads": 1})]
    wanted = [n for n in shop if "." not in n or (n.split(".")[1] in names)]
    command += [part for n in wanted for part in ("--input", f"{n}={shop[n]}")]
    command += [part for n, file in outputs.items() for part in ("--output", f"{n}={tmp_path / 'run' / file}")]
    subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    record = read_json(tmp_path / "run/train.stage.json")
    (tmp_path / "run/train.stage.json").unlink()
    assert record["stage"] == "cm3.baselines.train" and record["peak_memory_mb"] > 0 and record["wall_seconds"] > 0

    facts = small.fit(shop, tmp_path / "own/run", name, FEW)
    assert record["best_valid"] == facts["best_valid"]
    assert small.written(tmp_path / "run", name) == small.written(tmp_path / "own/run", name)

    test, _ = small.scored(shop, tmp_path / "run", name)
    kinds = ("user_embeddings", "item_embeddings")
    paths = {kind: tmp_path / f"run/{kind}.parquet" for kind in kinds if name == "freedom"}
    paths = paths or {"weights": tmp_path / "run/model.safetensors"}
    command = evaluation(shop, paths, tmp_path / "cli", {"ks": [10], "top_n": 10})
    subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert read_json(tmp_path / "cli/evaluation.json")["test"] == test
    assert (tmp_path / "cli/recommendations.parquet").read_bytes() == (
        tmp_path / "recommendations.parquet"
    ).read_bytes()


def evaluation(shop, scored: dict[str, Path], folder: Path, spec) -> list[str]:
    inputs = {name: shop[name] for name in ("interactions", "items", "users")} | scored
    files = {"metrics": "evaluation.json", "per_user": "per_user.parquet", "recommendations": "recommendations.parquet"}
    command = [sys.executable, "-m", "cm3.evaluation.evaluate", "--spec", json.dumps(spec)]
    command += [part for n, path in inputs.items() for part in ("--input", f"{n}={path}")]
    return command + [part for n, file in files.items() for part in ("--output", f"{n}={folder / file}")]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_specs_import_no_torch_and_match_the_registry():
    code = "import sys; from cm3.model_registry import spec_classes; spec_classes(); "
    code += "assert not {'torch', 'scipy', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    for name, spec in spec_classes().items():
        assert spec.model_fields["name"].default == name and spec.version and spec.libraries and STAGES[spec.stage]


def test_the_documents_have_a_row_for_every_baseline():
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/baselines.md").read_text(), re.MULTILINE)
    assert set(rows) >= set(BASELINES)
