"""A small shop that the training tests share, and how they train on it."""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracles_cm3 as oracle
import pytest
import torch

from cm3.config import Model, Training
from cm3.similarity.stage import similarity
from cm3.training.train import train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few kB gain nothing from threads, and wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OUTPUTS = ("model.safetensors", "history.csv", "users.parquet", "items.parquet")
MODEL = {"embedding_dim": 8, "knn_k": 4}
TRAINING = {"batch_size": 64, "epochs": 6, "lr": 0.02, "device": "cpu", "tensorboard": False}


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


def stage_command(
    shop: Mapping[str, Path], folder: Path, training: Mapping[str, Any], runtime: Mapping[str, Any], code: str = ""
) -> list[str]:
    """Return the command that trains as `run` does, in a process of its own, with a record in `folder`."""
    chosen = Training(**TRAINING | training)
    spec = {"modalities": ["text", "image"], "model": Model(**MODEL).identity(), "training": chosen.identity()}
    command = [sys.executable, "-m", "cm3.training.train", "--spec", json.dumps(spec), "--code", code]
    command += ["--runtime", json.dumps({**chosen.runtime(), **runtime})]
    command += [part for name, path in shop.items() for part in ("--input", f"{name}={path}")]
    outputs = dict(zip(("model", "history", "users", "items"), OUTPUTS, strict=True)) | {"record": "record.json"}
    return command + [part for name, path in outputs.items() for part in ("--output", f"{name}={folder / path}")]


def written(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(OUTPUTS), "only the outputs are left"
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))
