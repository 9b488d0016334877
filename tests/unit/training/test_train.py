"""The training stage: determinism, early stopping, every switch, and inputs that cannot work."""

import logging
import math
from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from safetensors.torch import load_file
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, prepared, run, shop, written  # noqa: F401

import cm3.training.loop
from cm3.common.embeddings import read_embeddings
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.interactions import read_interactions
from cm3.common.tables import SIMILARITY, read_table, write_table
from cm3.config import Model
from cm3.model.model import CM3
from cm3.model.sampling import derived_seed, mixing_parameters
from cm3.training.adam import Adam


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


def test_exported_embeddings_are_those_of_the_exported_parameters(shop, tmp_path):
    run(shop, tmp_path)
    model, data = rebuilt(shop)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    expected = model.embed()
    items, _ = read_embeddings(tmp_path / "items.parquet", "item_id", data.item_ids)
    torch.testing.assert_close(torch.tensor(items), expected.items, rtol=0, atol=0)


def rebuilt(shop, seed: int = 42, **changes) -> tuple[CM3, object]:
    from cm3.model.graph import item_item_matrix

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
    monkeypatch.setattr("cm3.training.loop.Validation.score", lambda *_: next(values))
    facts = run(shop, tmp_path, training={"epochs": 5, "round_valid": digits})
    assert (facts["best_epoch"], facts["best_valid"]) == (best_epoch, best_valid)


def test_last_batch_embeddings_are_those_of_the_last_step(shop, tmp_path):
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

    monkeypatch.setattr("cm3.model.model.CM3", remember)
    run(shop, tmp_path / "out", training={"epochs": 1}, model={"missing": policy})
    stored = read_features(shop["features.image"])
    expected = stored.embedding[stored.ok].mean(0) if policy == "mean" else np.zeros(stored.embedding.shape[1])
    np.testing.assert_allclose(seen["image"][[2, 5]], [expected, expected], atol=1e-6)
    np.testing.assert_array_equal(seen["image"][stored.ok], stored.embedding[stored.ok])


def test_a_loss_that_is_not_finite_names_its_cause(shop, tmp_path, monkeypatch):
    step, steps = Adam.step, 0

    def poison(self, *arguments):
        nonlocal steps
        step(self, *arguments)
        steps += 1
        if steps == 5:
            with torch.no_grad():
                self.parameters[0].view(-1)[0] = float("nan")

    monkeypatch.setattr(Adam, "step", poison)
    # 240 training pairs in batches of 64: the sixth step is batch 2 of epoch 2.
    with pytest.raises(
        UserError, match=r"epoch 2, batch 2: the loss is not finite, in alignment.*cause: parameter users"
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

    monkeypatch.setattr("cm3.model.model.CM3", equal_points)
    with pytest.raises(UserError, match=r"epoch 1, batch 1: .*cause: model\.slerp: reference"):
        run(shop, tmp_path / "out", model={"slerp": "reference"})
    run(shop, tmp_path / "safe", model={"slerp": "safe"}, training={"epochs": 1})


def test_accelerators_check_the_whole_epoch_at_once(shop, tmp_path, monkeypatch):
    # There the loss is not waited for in each step, so the parameters may be spoilt by then.
    monkeypatch.setattr(cm3.training.loop.TrainingRun, "check_finite", lambda self, loss: None)
    mixing = cm3.model.model.mixing_parameters
    bad = derived_seed(42, 2, 1)
    monkeypatch.setattr(cm3.model.model, "mixing_parameters", lambda *a: mixing(*a) * (math.nan if a[-1] == bad else 1))
    with pytest.raises(UserError, match=r"epoch 2, batch 2: the loss is not finite, in .*; cause: parameter users"):
        run(shop, tmp_path)
    assert not (tmp_path / "checkpoints/last.safetensors").exists(), "a spoilt state is not kept"


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
    with pytest.raises(UserError, match=r"training\.device = 'cuda': not available on this machine"):
        run(shop, tmp_path, training={"device": "cuda"})
