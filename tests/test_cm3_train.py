"""The training stage: determinism, resuming, early stopping, every switch, and inputs that cannot work."""

import csv
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from safetensors.torch import load_file

import cm3.fit
from cm3.checkpoint import Checkpoint
from cm3.config import Model, Training
from cm3.embeddings import read_embeddings
from cm3.interactions import read_interactions
from cm3.model import CM3
from cm3.sampling import derived_seed, mixing_parameters
from cm3.similarity import similarity
from cm3.train import train
from stages.errors import UserError
from stages.tables import SIMILARITY, read_features, read_table, write_table


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few kB gain nothing from threads, and wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OUTPUTS = ("model.safetensors", "history.csv", "users.parquet", "items.parquet")
MODEL = {"embedding_dim": 8, "knn_k": 4}
TRAINING = {"batch_size": 64, "epochs": 6, "lr": 0.02, "device": "cpu"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, Path]:
    return prepared(tmp_path_factory.mktemp("shop"))


def prepared(folder: Path, **options) -> dict[str, Path]:
    paths = oracle.write_shop(folder, **options)
    for modality in options.get("modalities", ("text", "image")):
        path = paths[f"similarity.{modality}"] = folder / f"similarity-{modality}.parquet"
        similarity(features=paths[f"features.{modality}"], output=path, knn_k=4)
    return paths


def run(shop, folder: Path, modalities=("text", "image"), code="", model=None, training=None):
    names = ("model_output", "history_output", "users_output", "items_output")
    return train(
        interactions=shop["interactions"],
        items=shop["items"],
        users=shop["users"],
        features={m: shop[f"features.{m}"] for m in modalities},
        similarity={m: shop[f"similarity.{m}"] for m in modalities},
        modalities=modalities,
        model=Model(**MODEL | (model or {})),
        training=Training(**TRAINING | (training or {})),
        code=code,
        **{name: folder / output for name, output in zip(names, OUTPUTS, strict=True)},
    )


def written(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(OUTPUTS), "only the outputs are left"
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("modalities", [("text",), ("text", "image"), ("text", "image", "caption", "sound", "video")])
def test_training_learns_and_repeats_to_the_byte(tmp_path, modalities):
    shop = prepared(tmp_path / "data" if (tmp_path / "data").mkdir() is None else tmp_path, modalities=modalities)
    facts = run(shop, tmp_path / "a", modalities)
    run(shop, tmp_path / "b", modalities)
    assert written(tmp_path / "a") == written(tmp_path / "b")
    rows = history(tmp_path / "a")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert facts["best_valid"] == max(float(row["valid_recall@20"]) for row in rows)
    assert facts["selection"] == {"split": "valid", "value": facts["best_valid"]}
    users, metadata = read_embeddings(tmp_path / "a/users.parquet", "user_id", [f"user{u}" for u in range(40)])
    assert users.shape == (40, (len(modalities) + 1) * 8) and metadata["epoch"] == facts["best_epoch"]


def test_another_seed_gives_another_model(shop, tmp_path):
    run(shop, tmp_path / "a")
    run(shop, tmp_path / "b", training={"seed": 7})
    assert written(tmp_path / "a")["users.parquet"] != written(tmp_path / "b")["users.parquet"]


def test_exported_embeddings_are_the_exported_parameters_at_the_middle_of_the_curve(shop, tmp_path):
    run(shop, tmp_path)
    model, data = rebuilt(shop)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    expected = model.embed()
    items, _ = read_embeddings(tmp_path / "items.parquet", "item_id", data.item_ids)
    torch.testing.assert_close(torch.tensor(items), expected.items, rtol=0, atol=0)


def rebuilt(shop, seed: int = 42, **changes) -> tuple[CM3, object]:
    from cm3.graph import item_item_matrix

    data = read_interactions(shop["interactions"], shop["items"], shop["users"])
    settings = Model(**MODEL | changes)
    features = [torch.from_numpy(read_features(shop[f"features.{m}"]).embedding.copy()) for m in ("text", "image")]
    neighbours = []
    for m in ("text", "image"):
        table = read_table(shop[f"similarity.{m}"], SIMILARITY)
        neighbours.append((table.column("item").to_numpy(), table.column("neighbour").to_numpy()))
    graph = item_item_matrix(neighbours, [0.9, 0.1], len(data.item_ids))
    torch.manual_seed(derived_seed(seed))
    return CM3(features, data.matrix("train"), graph, settings), data


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9, 13])
@pytest.mark.parametrize("eval_embeddings", ["fresh", "last_batch"])
def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_never_was(
    shop, tmp_path, monkeypatch, stop_after, eval_embeddings
):
    training = {"checkpoint_seconds": 0, "eval_embeddings": eval_embeddings}
    run(shop, tmp_path / "whole", training=training)
    save, stops = Checkpoint.save, 0

    def save_then_stop(self, tensors, state):
        nonlocal saves
        save(self, tensors, state)
        saves += 1
        if saves == stop_after:
            raise Stopped

    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    while True:
        saves = 0
        try:
            run(shop, tmp_path / "stopped", training=training)
            break
        except Stopped:
            stops += 1
    assert stops >= 1
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_a_killed_process_goes_on_to_the_same_bytes(shop, tmp_path):
    training = TRAINING | {"epochs": 12}
    identity = Training(**training).identity()
    spec = {"modalities": ["text", "image"], "model": Model(**MODEL).identity(), "training": identity}
    run(shop, tmp_path / "whole", training=training, code="c0de")

    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "cm3.train", "--spec", json.dumps(spec), "--code", "c0de"]
    command += ["--runtime", json.dumps({"device": "cpu", "checkpoint_seconds": 0, "threads": torch.get_num_threads()})]
    command += [part for name, path in shop.items() for part in ("--input", f"{name}={path}")]
    outputs = dict(zip(("model", "history", "users", "items"), OUTPUTS, strict=True)) | {"record": "record.json"}
    command += [part for name, path in outputs.items() for part in ("--output", f"{name}={folder / path}")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    checkpoint, chance, resumed = folder / "checkpoints/last.safetensors", random.Random(0), False
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        resumed |= "going on from the checkpoint" in process.communicate()[1]
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "going on from the checkpoint" in last.stderr or resumed
    record = json.loads((folder / "record.json").read_text())
    assert record["stage"] == "cm3.train" and record["epochs"] == len(history(folder)) and record["peak_memory_mb"] > 0
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == written(tmp_path / "whole")
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("change", ["code", "model", "training", "inputs"])
def test_a_checkpoint_of_other_code_settings_or_inputs_is_not_resumed(shop, tmp_path, monkeypatch, caplog, change):
    save = Checkpoint.save

    def save_then_stop(self, tensors, state):
        save(self, tensors, state)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoint, "save", save_then_stop)
        run(shop, tmp_path / "out", code="one", training={"checkpoint_seconds": 0})
    changes = {
        "code": {"code": "two"},
        "model": {"code": "one", "model": {"gamma": 0.4}},
        "training": {"code": "one", "training": {"lr": 0.01}},
        "inputs": {"code": "one"},
    }[change]
    if change == "inputs":
        (tmp_path / "data").mkdir()
        shop = prepared(tmp_path / "data", seed=9)
    with caplog.at_level(logging.WARNING):
        run(shop, tmp_path / "out", **changes)
    assert "starting afresh" in caplog.text
    run(shop, tmp_path / "clean", **changes)
    assert written(tmp_path / "out") == written(tmp_path / "clean")


def test_a_broken_checkpoint_is_not_resumed(shop, tmp_path, caplog):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/checkpoints/last.safetensors").write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        run(shop, tmp_path / "out", training={"epochs": 1})
    assert "unreadable" in caplog.text
    written(tmp_path / "out")


def test_a_resume_may_change_the_checkpoint_interval(shop, tmp_path):
    shared = dict.fromkeys(("a", "b"))
    for name, seconds in (("a", 0), ("b", 1000)):
        run(shop, tmp_path / name, training={"checkpoint_seconds": seconds})
        shared[name] = written(tmp_path / name)
    assert shared["a"] == shared["b"]


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_exact(shop, tmp_path, patience):
    # Steps this small change no ranking, so only the first validation is an improvement.
    facts = run(shop, tmp_path, training={"lr": 1e-12, "patience": patience, "epochs": 50})
    assert facts["epochs"] == 1 + patience and facts["best_epoch"] == 1
    assert facts["stopped"] == f"no better recall@20 in {patience} validations"


def test_validation_can_be_rarer_than_epochs(shop, tmp_path):
    run(shop, tmp_path, training={"validate_every": 4, "epochs": 6})
    filled = [row["epoch"] for row in history(tmp_path) if row["valid_recall@20"]]
    assert filled == ["4", "6"]


@pytest.mark.parametrize(("digits", "best_epoch", "best_valid"), [(None, 4, 0.25031), (4, 3, 0.2503), (2, 1, 0.25)])
def test_round_valid_keeps_the_first_of_values_that_round_alike(
    shop, tmp_path, monkeypatch, digits, best_epoch, best_valid
):
    values = iter([0.25001, 0.25004, 0.25029, 0.25031, 0.2])
    monkeypatch.setattr("cm3.fit.Validation.score", lambda *_: next(values))
    facts = run(shop, tmp_path, training={"epochs": 5, "round_valid": digits})
    assert (facts["best_epoch"], facts["best_valid"]) == (best_epoch, best_valid)


def test_last_batch_embeddings_are_those_that_the_last_batch_was_trained_on(shop, tmp_path):
    one_batch = {"epochs": 1, "batch_size": 10_000, "eval_embeddings": "last_batch"}
    run(shop, tmp_path, training=one_batch)
    model, data = rebuilt(shop)
    t = mixing_parameters(model.settings.alpha, model.n_items, torch.device("cpu"), derived_seed(42, 1, 0))
    items, _ = read_embeddings(tmp_path / "items.parquet", "item_id", data.item_ids)
    torch.testing.assert_close(torch.tensor(items), model(t).items.detach(), rtol=0, atol=0)


def changed_test_split(shop, folder: Path) -> dict[str, Path]:
    data = read_interactions(shop["interactions"], shop["items"], shop["users"])
    items = np.where(data.split == 2, (data.items + 11) % 30, data.items)
    folder.mkdir()
    return shop | oracle.write_interactions(folder, data.users, items, data.split, 40, 30)


def test_the_test_split_is_not_read_unless_asked_for(shop, tmp_path):
    other = changed_test_split(shop, tmp_path / "data")
    run(shop, tmp_path / "a")
    run(other, tmp_path / "b")
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert not [name for name in history(tmp_path / "a")[0] if name.startswith("test")]


def test_selecting_on_test_scores_it_every_epoch_and_says_so(shop, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        facts = run(shop, tmp_path, training={"select_on": "test", "monitor": "recall@5"})
    rows = history(tmp_path)
    assert facts["selection"] == {
        "split": "test",
        "value": float(rows[facts["best_epoch"] - 1]["test_recall@5"]),
    }
    assert "replication only" in facts["warning"] and "replication only" in caplog.text


def test_weight_decay_reaches_the_optimiser(shop, tmp_path):
    norms = []
    for name, decay in (("plain", 0.0), ("decayed", 1.0)):
        run(shop, tmp_path / name, training={"weight_decay": decay, "patience": 100})
        parameters = load_file(tmp_path / name / "model.safetensors")
        norms.append(float(parameters["modalities.0.hidden.weight"].norm()))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize(
    "change",
    [
        {"detach_similarity": not Model().detach_similarity},
        {"dedup_pairs": False},
        {"uniformity_items": "positive"},
        {"uniformity_items": "uniform"},
        {"gamma": 0.3},
        {"max_sim": 0.1},
        {"min_sim": 0.5},
        {"alpha": 5.0},
        {"n_ui_layers": 1},
        {"n_mm_layers": 2},
        {"modality_weights": {"text": 0.5, "image": 0.5}},
    ],
)
def test_every_knob_of_the_model_reaches_training(shop, tmp_path, change):
    run(shop, tmp_path / "a", training={"epochs": 1})
    run(shop, tmp_path / "b", training={"epochs": 1}, model=change)
    assert written(tmp_path / "a")["items.parquet"] != written(tmp_path / "b")["items.parquet"]


@pytest.mark.parametrize("policy", ["mean", "zero"])
def test_missing_features_take_the_mean_of_the_others_or_zero(tmp_path, policy, monkeypatch):
    (tmp_path / "data").mkdir()
    shop = prepared(tmp_path / "data", missing={"image": [2, 5]})
    seen = {}

    def remember(features, *rest):
        seen["image"] = features[1].numpy().copy()
        return CM3(features, *rest)

    monkeypatch.setattr("cm3.train.CM3", remember)
    run(shop, tmp_path / "out", training={"epochs": 1}, model={"missing": policy})
    stored = read_features(shop["features.image"])
    expected = stored.embedding[stored.ok].mean(0) if policy == "mean" else np.zeros(stored.embedding.shape[1])
    np.testing.assert_allclose(seen["image"][[2, 5]], [expected, expected], atol=1e-6)
    np.testing.assert_array_equal(seen["image"][stored.ok], stored.embedding[stored.ok])


def test_a_loss_that_is_not_finite_names_epoch_batch_and_culprit(shop, tmp_path, monkeypatch):
    step, steps = torch.optim.Adam.step, 0

    def poison(self, *arguments):
        nonlocal steps
        step(self, *arguments)
        steps += 1
        if steps == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("nan")

    monkeypatch.setattr(torch.optim.Adam, "step", poison)
    # 240 training pairs in batches of 64: the sixth step is batch 2 of epoch 2.
    with pytest.raises(
        UserError, match=r"epoch 2, batch 2: the loss is not finite, in alignment.*culprit: parameter users"
    ):
        run(shop, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_reference_slerp_is_named_when_it_breaks(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shop = prepared(tmp_path / "data")
    shop["features.image"], shop["similarity.image"] = shop["features.text"], shop["similarity.text"]

    def equal_points(*arguments):
        model = CM3(*arguments)
        model.modalities[1].point.load_state_dict(model.modalities[0].point.state_dict())
        return model

    monkeypatch.setattr("cm3.train.CM3", equal_points)
    with pytest.raises(UserError, match=r"epoch 1, batch 1: .*culprit: model\.slerp: reference"):
        run(shop, tmp_path / "out", model={"slerp": "reference"})
    run(shop, tmp_path / "safe", model={"slerp": "safe"}, training={"epochs": 1})


def test_accelerators_check_the_whole_epoch_at_once(shop):
    parts = torch.tensor([[1.0, 2.0, 3.0], [1.0, float("inf"), 3.0]])
    with pytest.raises(UserError, match="epoch 4, batch 2: the loss is not finite, in user_uniformity"):
        cm3.fit._require_finite_parts(parts, rebuilt(shop)[0], 4)


def test_features_of_other_items_are_refused(shop, tmp_path):
    (tmp_path / "data").mkdir()
    other = prepared(tmp_path / "data", n_items=31)
    with pytest.raises(UserError, match=r"31 rows, 30 items"):
        run(shop | {"features.image": other["features.image"]}, tmp_path / "out")


def test_a_graph_with_another_number_of_neighbours_is_refused(shop, tmp_path):
    with pytest.raises(UserError, match="item 0 has 4 neighbours, but knn_k is 6"):
        run(shop, tmp_path, model={"knn_k": 6})


def test_a_graph_that_names_unknown_items_is_refused(shop, tmp_path):
    table = read_table(shop["similarity.text"], SIMILARITY)
    neighbours = table.column("neighbour").to_numpy().copy()
    neighbours[3] = 30
    path = tmp_path / "similarity.parquet"
    write_table(path, table.set_column(1, "neighbour", [neighbours]), SIMILARITY)
    with pytest.raises(UserError, match="names item 30, but there are 30 items"):
        run(shop | {"similarity.text": path}, tmp_path / "out")


@pytest.mark.parametrize(
    ("users", "items", "split", "message"),
    [
        ([0, 40], [1, 2], [0, 1], "row 1 has user 40, but .* has 40 rows"),
        ([0, 1], [1, -1], [0, 1], "row 1 has item -1"),
        ([0, 1], [1, 2], [1, 1], "no row is in the train split"),
        ([0, 1], [1, 2], [0, 2], "no row is in the valid split"),
    ],
)
def test_interactions_that_do_not_fit_are_refused(shop, tmp_path, users, items, split, message):
    (tmp_path / "data").mkdir()
    other = oracle.write_interactions(
        tmp_path / "data", np.array(users), np.array(items), np.array(split, np.int8), 40, 30
    )
    with pytest.raises(UserError, match=message):
        run(shop | other, tmp_path / "out")


def test_no_cuda_is_said_plainly(shop, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="device 'cuda' is not available here"):
        run(shop, tmp_path, training={"device": "cuda"})
