"""A run that starts from an earlier model of less data."""

from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_shop import MODEL, OUTPUTS, TRAINING, history, one_thread, prepared, run, shop

import cm3.training.train
from cm3.common.embeddings import read_embeddings, write_embeddings
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.interactions import read_interactions
from cm3.common.tables import USERS, write_table
from cm3.config import Model, Training

__all__ = ["one_thread", "shop"]


def go_on(shop, folder: Path, earlier: Path, model=None, training=None, learnt=None):
    learnt = learnt or shop
    names = ("model_output", "history_output", "users_output", "items_output")
    return cm3.training.train.train(
        **{name: shop[name] for name in ("interactions", "items", "users")},
        features={m: shop[f"features.{m}"] for m in ("text", "image")},
        similarity={m: shop[f"similarity.{m}"] for m in ("text", "image")},
        modalities=("text", "image"),
        model=Model(**MODEL | (model or {})),
        training=Training(**TRAINING | (training or {}) | {"warm_start": str(earlier)}),
        warm={name: learnt[name] for name in ("interactions", "items", "users")}
        | {"model": earlier / "model.safetensors", "vectors": earlier / "users.parquet"},
        **{name: folder / output for name, output in zip(names, OUTPUTS, strict=True)},
    )


def test_a_run_starts_where_the_earlier_one_was_best(shop, tmp_path):
    earlier = run(shop, tmp_path / "earlier")
    facts = go_on(shop, tmp_path / "later", tmp_path / "earlier", training={"epochs": 1, "lr": 1e-9})
    assert facts["warm_start"] == {"known_users": 40, "new_users": 0}
    assert facts["best_valid"] == pytest.approx(earlier["best_valid"], abs=1e-6)
    first, cold = (float(history(tmp_path / name)[0]["loss"]) for name in ("later", "earlier"))
    assert first < cold


def test_known_users_are_matched_by_id(shop, tmp_path):
    run(shop, tmp_path / "earlier")
    # The earlier run knew half of the users, in another order.
    ids = [f"user{n}" for n in range(40)]
    vectors, metadata = read_embeddings(tmp_path / "earlier/users.parquet", "user_id", ids)
    order = np.random.default_rng(0).permutation(40)[:20]
    tensors = load_file(tmp_path / "earlier/model.safetensors")
    half = tmp_path / "half"
    write_embeddings(half / "users.parquet", "user_id", [ids[n] for n in order], vectors[order], metadata)
    kept = {
        name: value[order].contiguous() if name in ("users", "stream_logits") else value
        for name, value in tensors.items()
    }
    save_file(kept, half / "model.safetensors")
    data, place = read_interactions(shop["interactions"], shop["items"], shop["users"]), np.full(40, -1)
    place[order] = np.arange(20)
    mine = place[data.users] >= 0
    (tmp_path / "data").mkdir()
    learnt = oracle.write_interactions(
        tmp_path / "data", place[data.users[mine]], data.items[mine], data.split[mine], 20, 30
    )
    write_table(learnt["users"], pa.table({"user": range(20), "user_id": [ids[n] for n in order]}), USERS)
    with pytest.raises(
        UserError, match=r"have other users than users\.parquet; copy the tables that the run was trained on"
    ):
        go_on(shop, tmp_path / "later", half)
    facts = go_on(shop, tmp_path / "later", half, training={"epochs": 1, "lr": 1e-12}, learnt=learnt)
    assert facts["warm_start"] == {"known_users": 20, "new_users": 20}
    later = load_file(tmp_path / "later/model.safetensors")
    np.testing.assert_allclose(later["users"][order], tensors["users"][order], atol=1e-6)
    new = np.setdiff1d(np.arange(40), order)
    assert not np.allclose(later["users"][new], tensors["users"][new], atol=1e-3)
    torch.testing.assert_close(later["modalities.0.hidden.weight"], tensors["modalities.0.hidden.weight"])


def test_a_model_of_other_settings_is_refused(shop, tmp_path):
    run(shop, tmp_path / "earlier", model={"embedding_dim": 4})
    with pytest.raises(UserError, match=r"has \[40, 3, 4\] for users, but this model needs \[40, 3, 8\]"):
        go_on(shop, tmp_path / "later", tmp_path / "earlier")
    with pytest.raises(UserError, match=r"training\.warm_start: .*: no such file"):
        go_on(shop, tmp_path / "later", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "users.parquet"])
def test_damaged_files_of_the_earlier_run_are_named(shop, tmp_path, name):
    run(shop, tmp_path / "earlier")
    path = tmp_path / "earlier" / name
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # of the vectors file, only the ids are read, which come first
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"training\.warm_start: .*{name}: damaged .*copy it again") as found:
        go_on(shop, tmp_path / "later", tmp_path / "earlier")
    assert not isinstance(found.value, DamagedFileError)


def test_leakage_is_refused(shop, tmp_path):
    run(shop, tmp_path / "earlier")
    data = read_interactions(shop["interactions"], shop["items"], shop["users"])
    (tmp_path / "other").mkdir()
    labels = np.array([2, 1, 0])[data.split]  # train and test change places
    other = shop | oracle.write_interactions(tmp_path / "other", data.users, data.items, labels, 40, 30)
    leaked, held = (data.split == 0).sum(), (data.split != 2).sum()
    with pytest.raises(
        UserError, match=rf"trained on {leaked} of the {held} interactions of the validation and test splits"
    ):
        go_on(other, tmp_path / "later", tmp_path / "earlier", learnt=shop)


@pytest.mark.parametrize("seed", [0, 1])
def test_on_grown_data_it_needs_fewer_epochs_for_the_same_score(tmp_path, seed):
    (tmp_path / "data").mkdir()
    whole = prepared(tmp_path / "data", n_users=120, n_items=60, seed=seed)
    data = read_interactions(whole["interactions"], whole["items"], whole["users"])
    kept = (np.random.default_rng(seed).random(len(data.users)) < 0.9) | (data.split != 0)
    (tmp_path / "less").mkdir()
    columns = (data.users[kept], data.items[kept], data.split[kept])
    less = whole | oracle.write_interactions(tmp_path / "less", *columns, 120, 60)
    training = {"epochs": 60, "patience": 8, "batch_size": 256, "monitor": "ndcg@5"}
    run(less, tmp_path / "earlier", training=training)
    cold = run(whole, tmp_path / "cold", training=training)
    warm = go_on(whole, tmp_path / "warm", tmp_path / "earlier", training=training, learnt=less)
    assert warm["best_valid"] >= cold["best_valid"] - 0.05
    values = [float(row["valid_ndcg@5"]) for row in history(tmp_path / "warm")]
    assert values[0] > float(history(tmp_path / "cold")[0]["valid_ndcg@5"])
