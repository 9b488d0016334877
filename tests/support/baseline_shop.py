"""How the tests of the baselines fit and score a model on a small shop."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cm3.baselines.base import Baseline, parse_baseline
from cm3.baselines.inputs import Inputs, read_inputs
from cm3.baselines.train import train
from cm3.common.interactions import Interactions, read_interactions
from cm3.config import Evaluation, Training
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.recommendations import publish_recommendations, read_ids
from cm3.model_registry import spec_classes

BASELINES = {name: spec for name, spec in spec_classes().items() if issubclass(spec, Baseline)}
EMBEDDINGS = {
    "history_output": "history.csv",
    "users_output": "user_embeddings.parquet",
    "items_output": "item_embeddings.parquet",
}

# What suits 120 users and 50 items, where a thousandth of a real shop's steps are made.
SMALL: dict[str, dict[str, Any]] = {
    "itemknn": {"k": 20, "shrink": 1.0},
    "itemknn-content": {"k": 10},
    "ease": {"l2": 20.0},
    "cease": {"l2": 20.0},
    "freedom": {"knn_k": 4, "dropout": 0.2},
    "mgcn": {"knn_k": 4},
    "bm3": {"dropout": 0.2},
    "directau": {"gamma": 0.3},
    "mmgcf": {"dropout": 0.2},
    "lirdrec": {"knn_k": 4},
    "smore": {"knn_k": 4},
}
TRAINING: dict[str, Any] = {
    "batch_size": 256,
    "epochs": 40,
    "lr": 0.02,
    "patience": 10,
    "monitor": "recall@10",
    "device": "cpu",
    "tensorboard": False,
}
# Its loss has little to say until the modalities agree.
PATIENT = {"bm3": {"epochs": 80, "patience": 60}}


def settings(name: str, **changes: Any) -> Any:
    dim = {"embedding_dim": 16} if "embedding_dim" in BASELINES[name].model_fields else {}
    return parse_baseline({"name": name} | dim | SMALL.get(name, {}) | changes)


def modalities(name: str) -> tuple[str, ...]:
    return ("text", "image") if BASELINES[name].reads_features else ()


def outputs(name: str) -> dict[str, str]:
    return {"model_output": "model.safetensors"} | (EMBEDDINGS if BASELINES[name].exports == "embeddings" else {})


def fit(shop: dict[str, Path], folder: Path, name: str, training: dict[str, Any] | None = None, **changes: Any) -> Any:
    return train(
        interactions=shop["interactions"],
        items=shop["items"],
        users=shop["users"],
        model=settings(name, **changes),
        training=Training(**TRAINING | PATIENT.get(name, {}) | (training or {})),
        modalities=modalities(name),
        features={m: shop[f"features.{m}"] for m in modalities(name)},
        similarity={m: shop[f"similarity.{m}"] for m in modalities(name)} if BASELINES[name].reads_item_graphs else {},
        **{output: folder / file for output, file in outputs(name).items()},
    )


def written(folder: Path, name: str) -> dict[str, bytes]:
    files = sorted(outputs(name).values())
    left = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
    assert left == files, "only the outputs are left"
    return {file: (folder / file).read_bytes() for file in files}


def scored(
    shop: dict[str, Path], folder: Path, name: str, k: int = 10
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Return the test metrics and each test user's recommendations, best first, from the files of a fitted model."""
    if BASELINES[name].exports == "embeddings":
        paths = {f"{kind}_embeddings": folder / f"{kind}_embeddings.parquet" for kind in ("user", "item")}
    else:
        paths = {"weights": folder / "model.safetensors"}
    result = evaluate(
        **{table: shop[table] for table in ("interactions", "items", "users")},
        files=paths,
        settings=Evaluation(ks=[k], top_n=k),
        metrics_output=folder.parent / "evaluation.json",
        per_user_output=folder.parent / "per_user.parquet",
        recommendations_output=folder.parent / "recommendations.parquet",
    )
    ids = read_ids(shop["users"], shop["items"])
    publish_recommendations(folder.parent / "recommendations.parquet", folder.parent / "published.parquet", ids)
    lists: dict[str, list[str]] = {}
    for row in pq.read_table(folder.parent / "published.parquet").to_pylist():
        lists.setdefault(row["user_id"], []).append(row["item_id"])
    return result["test"], lists


def read(shop: dict[str, Path], name: str) -> tuple[Interactions, Inputs]:
    data = read_interactions(shop["interactions"], shop["items"], shop["users"])
    kinds = ({m: shop[f"{kind}.{m}"] for m in modalities(name)} for kind in ("features", "similarity"))
    return data, read_inputs(data, settings(name), modalities(name), *kinds)
