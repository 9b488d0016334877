"""New items of a model that was loaded from an experiment's folder, embedded by the features in processed/."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_shop import MODEL, OUTPUTS, prepared, run

import cm3
from cm3.common.errors import UserError
from cm3.common.features import features_file, graph_file, read_features, write_features
from cm3.common.pca import Projection
from cm3.common.reduction import projection_file
from cm3.config import Model

KEYS = {"text": "aaaaaaaaaaaa", "image": "bbbbbbbbbbbb"}
CONTROL = {"image": "gaussian"}


def publish(folder: Path, model: dict[str, Any] | None = None, **training: Any) -> Path:
    """Train on the small shop and lay its files out as the pipeline does; return results/shop."""
    data, results = folder / "processed/data", folder / "results/shop"
    data.mkdir(parents=True)
    shop = prepared(data)
    facts = run(shop, results, model=model, training={"epochs": 2, **training})
    for modality, key in KEYS.items():
        control = f"{CONTROL[modality]}-42" if modality in CONTROL else ""
        features = data / features_file(modality, "model", key, control)
        graph = data / graph_file(features.stem, 4, "exact", "drop")
        for source, target in ((shop[f"features.{modality}"], features), (shop[f"similarity.{modality}"], graph)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)
    (results / OUTPUTS[2]).rename(results / "user_embeddings.parquet")
    (results / OUTPUTS[3]).rename(results / "item_embeddings.parquet")
    settings = Model(**MODEL | (model or {}))
    config = {
        "modalities": list(KEYS),
        "extractors": {m: {"name": "model", "modality": m} for m in KEYS},
        "control": CONTROL,
        "model": {"name": "cm3"} | settings.identity(),
        "training": {"seed": 42, "eval_embeddings": "fresh", **training},
    }
    content = {"dataset": "data", "config": config, "keys": {"features": KEYS}, "training": facts}
    (results / "metrics.json").write_text(json.dumps(content, default=str))
    return results


def reduce_text(results: Path) -> np.ndarray:
    """Make the text features of a published experiment those of a reduction, and return the wide ones."""
    path = next((results.parents[1] / "processed/data/features/text").glob("*.parquet"))
    narrow = read_features(path)
    width = narrow.embedding.shape[1]
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((width + 4, width)))[0].T
    given = {"axes": axes, "mean": np.zeros(width + 4), "variances": np.ones(width), "total_variance": np.array(1.0)}
    Projection(**{name: torch.from_numpy(x) for name, x in given.items()}).save(
        projection_file(str(path), f"pca{width}")
    )
    graph = next((results.parents[1] / "processed/data/similarity").glob(f"{path.stem}-k*.parquet"))
    for file in (path, graph):
        file.rename(file.with_name(file.name.replace(path.stem, f"{path.stem}-pca{width}")))
    content = json.loads((results / "metrics.json").read_text())
    content["config"]["reduce"] = {"text": {"method": "pca", "dim": width}}
    (results / "metrics.json").write_text(json.dumps(content))
    return (narrow.embedding @ axes).astype(np.float32)


def test_wide_vectors_of_new_items_are_projected_as_those_of_the_catalogue(tmp_path: Path):
    results = publish(tmp_path)
    new = of_old_items(results, [2, 3])
    before = cm3.embed_items(cm3.load(results), new)
    wide = {**new, "text": reduce_text(results)[[2, 3]]}
    loaded = cm3.load(results)
    np.testing.assert_allclose(cm3.embed_items(loaded, wide), before, atol=1e-5)
    loaded.save(tmp_path / "saved")
    np.testing.assert_array_equal(cm3.embed_items(cm3.load(tmp_path / "saved"), wide), cm3.embed_items(loaded, wide))
    with pytest.raises(ValueError, match=r"features\['text'\]"):
        cm3.embed_items(loaded, new)


def of_old_items(results: Path, rows: list[int]) -> dict[str, np.ndarray]:
    place = results.parents[1] / "processed/data/features"
    return {m: read_features(next((place / m).glob("*.parquet"))).embedding[rows] for m in KEYS}


@pytest.mark.parametrize(
    ("model", "training"),
    [({"n_mm_layers": 2}, {}), ({"item_graph": False}, {}), ({}, {"precision": "bfloat16"})],
    ids=["two layers", "no item graph", "bfloat16"],
)
def test_a_twin_of_an_item_is_its_neighbour(tmp_path: Path, model: dict[str, Any], training: dict[str, Any]):
    results = publish(tmp_path, model, **training)
    loaded = cm3.load(results)
    grown = cm3.add_items(loaded, ["twin"], of_old_items(results, [5]))
    assert grown.item_ids[-1] == "twin"
    nearest = [item for item, _ in cm3.similar_items(grown, "twin", 3)]
    assert loaded.item_ids[5] in nearest
    assert cm3.recommend(grown, loaded.user_ids[0], k=len(grown.item_ids))


def test_it_is_saved_with_what_new_items_need(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results = publish(tmp_path)
    loaded, new = cm3.load(results), of_old_items(results, [2, 3])
    loaded.save(tmp_path / "saved")
    vectors = cm3.embed_items(loaded, new)
    shutil.rmtree(tmp_path / "processed")
    np.testing.assert_array_equal(cm3.embed_items(cm3.load(tmp_path / "saved"), new), vectors)
    bare = cm3.load(results)
    with pytest.raises(ValueError, match=r"cannot embed new items: .* load it with interactions=\.\.\."):
        cm3.embed_items(bare, new)
    assert len(cm3.recommend_for(bare, loaded.item_ids[:2], k=3)) == 3


def test_features_that_have_changed_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results = publish(tmp_path)
    new = of_old_items(results, [0])
    path = next((tmp_path / "processed/data/features/text").glob("*.parquet"))
    features = read_features(path)
    write_features(path, features.item_ids, features.embedding[::-1], features.status.tolist(), {})
    with pytest.raises(ValueError, match=r"not those that the model was trained with; run the experiment again"):
        cm3.embed_items(cm3.load(results), new)
    cm3.load(results).save(tmp_path / "saved")
    assert "the saved model cannot embed new items" in caplog.text
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}"):
        cm3.embed_items(cm3.load(results), new)
