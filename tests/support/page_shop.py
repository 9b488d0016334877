"""An experiment on a small shop with images, captions and hostile texts, ready for its page."""

from pathlib import Path
from typing import Any

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
from fixtures_extractors import COLOURS, shape, write_images, write_items
from safetensors.torch import save_file
from training_shop import OUTPUTS, prepared, run

from cm3.common.files import write_json
from cm3.common.interactions import read_interactions
from cm3.common.tables import CAPTIONS, write_table
from cm3.config import Evaluation
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.item_weights import ItemWeights
from cm3.evaluation.recommendations import publish_recommendations, read_ids
from workflow.publish import gather

N_ITEMS = 30
SCRIPT = "<script>window.broken = true</script>"
ATTRIBUTE = '" onmouseover="window.broken = true" x="'
ISLAND = "</script><img src=x onerror='window.broken = true'>"
HOSTILE = {0: SCRIPT, 1: ATTRIBUTE, 2: ISLAND, 3: "{{ 7 * 7 }} {% raw %}", 4: "\u202eright to left & <b>bold</b>"}
MODALITIES = ("text", "image", "caption")


def experiment(folder: Path) -> dict[str, Path]:
    """Train CM3 on the shop and return the inputs of its page."""
    paths = prepared(folder, n_items=N_ITEMS, modalities=MODALITIES)
    titles = [HOSTILE.get(item, f"Thing {item}") for item in range(N_ITEMS)]
    rows = [{"item_id": f"item{item}", "title": title} for item, title in enumerate(titles)]
    rows[N_ITEMS - 1]["title"] = None  # nothing at all is known of the last
    colours = list(COLOURS)
    images: list[bytes | str | None] = [
        shape("square" if item % 2 else "circle", colours[item % 6], 200, item) for item in range(N_ITEMS)
    ]
    images[5], images[6], images[7] = None, f"0 bytes {SCRIPT}", "corrupt: image file is truncated (47 bytes)"
    paths |= {
        "items": write_items(folder, rows),
        "manifest": write_images(folder / "images", images, ids=[f"item{i}" for i in range(N_ITEMS)]),
        "captions.caption": write_captions(folder / "captions.parquet"),
    }
    for modality in MODALITIES:
        path = paths[f"record.extract.{modality}"] = folder / f"extract-{modality}.stage.json"
        write_json(path, extraction(modality))
    trained = folder / "run"
    trained.mkdir()
    record = run(paths, trained, modalities=MODALITIES)
    for name, file in zip(("model", "history", "user_embeddings", "item_embeddings"), OUTPUTS, strict=True):
        paths[name] = trained / file
    exported = {name: paths[name] for name in ("user_embeddings", "item_embeddings")}
    paths |= measured(folder, paths, record, **exported)
    return {name: path for name, path in paths.items() if not name.startswith("features.")}


def extraction(modality: str) -> dict[str, Any]:
    failures = [{"item_id": "item6", "reason": "0 bytes"}] if modality == "image" else []
    counts = {"ok": N_ITEMS - len(failures), "missing": 0, "failed": len(failures)}
    return {"counts": counts, "failures": failures, "wall_seconds": 1.0, "peak_memory_mb": 100.0, "code": "c0de"}


def write_captions(path: Path) -> Path:
    columns: dict[str, list[Any]] = {name: [] for name in CAPTIONS.names}
    for item in range(N_ITEMS):
        failed = item == 8
        text = None if failed else f"an image of thing {item}" if item else SCRIPT
        for name, value in zip(
            columns,
            (
                f"item{item}",
                text,
                "failed" if failed else "ok",
                "the server says no" if failed else None,
                64 if item in (3, 8) else 4,
            ),
        ):
            columns[name].append(value)
    write_table(path, pa.Table.from_pydict(columns, schema=CAPTIONS), CAPTIONS, {"decoding": {"max_new_tokens": 64}})
    return path


def measured(folder: Path, tables: dict[str, Path], record: dict[str, Any], **exported: Path) -> dict[str, Path]:
    """Evaluate what a model exported, and gather metrics.json as publishing does."""
    outputs = {name: folder / f"{name}.parquet" for name in ("per_user", "recommendations")}
    tables = {name: tables[name] for name in ("interactions", "items", "users")}
    evaluation = evaluate(
        **tables,
        files=exported,
        settings=Evaluation(ks=[5, 10, 20]),
        metrics_output=folder / "evaluation.json",
        per_user_output=outputs["per_user"],
        recommendations_output=folder / "run.parquet",
    )
    publish_recommendations(
        folder / "run.parquet", outputs["recommendations"], read_ids(tables["users"], tables["items"])
    )
    outputs["metrics"] = folder / "metrics.json"
    content = bool(record.get("modality_weights"))
    write_json(
        outputs["metrics"], gather(provenance(content), evaluation, statistics(tables), records(record, content))
    )
    return outputs


def records(train: dict[str, Any], content: bool) -> dict[str, Any]:
    cost = {"wall_seconds": 72.4, "peak_memory_mb": 1234.5, "code": "c0de", "versions": {"python": "3.11"}}
    found = dict.fromkeys(("prepare", "split", "evaluate"), cost) | {"train": cost | train}
    return found | {f"extract.{m}": extraction(m) for m in MODALITIES if content}


def provenance(content: bool) -> dict[str, Any]:
    encoder = {"backend": "sentence-transformers", "model": "package:minilm", "dtype": "float32"}
    used = MODALITIES if content else ()
    extractors = {m: {"name": f"my-{m}", **encoder} for m in used}
    if content:
        extractors["caption"] = {"name": "my-caption", "caption": encoder, "encoder": encoder}
    return {
        "experiment": "trial",
        "dataset": "shop",
        "command": "snakemake --cores 8 results/trial/metrics.json",
        "config": {
            "preset": "default",
            "source": None,
            "split": {"strategy": "random", "seed": 42},
            "modalities": list(used),
            "extractors": extractors,
            "model": {"name": "cm3" if content else "mostpop", "gamma": 0.9},
            "training": {"lr": 0.02},
            "evaluation": {"ks": [5, 10, 20], "score": "dot", "mask": "train"},
        },
        "keys": {"run": "0123456789ab", "features": dict.fromkeys(used, "ba9876543210")},
    }


def statistics(tables: dict[str, Path]) -> dict[str, Any]:
    data = read_interactions(tables["interactions"], tables["items"], tables["users"])
    users, items, rows = len(data.user_ids), len(data.item_ids), len(data.users)
    histogram = {"1": 0, "2-3": 0, "4-7": 3, "8-15": users - 3}
    return {
        "users": users,
        "items": items,
        "interactions": rows,
        "kcore": 5,
        "density": rows / users / items,
        "raw": {"users": users + 2, "items": items + 1, "interactions": rows + 9},
        "dropped": {"repeated_pairs": 2, "kcore": 7},
        "interactions_per_user": {"histogram": histogram},
        "interactions_per_item": {"histogram": histogram},
        "items_missing": {"title": 1, "brand": items, "price": 0},
    }


def bare_experiment(folder: Path) -> dict[str, Path]:
    """Item weights in place of embeddings, no features, no images, no epochs: as little as a page can be given."""
    paths = oracle.write_shop(folder, modalities=())
    data = read_interactions(paths["interactions"], paths["items"], paths["users"])
    together = np.asarray((data.matrix("train").T @ data.matrix("train")).todense(), np.float32)
    np.fill_diagonal(together, 0)
    paths["model"] = folder / "model.safetensors"
    save_file(ItemWeights(together).tensors(), paths["model"])
    record = {
        "monitor": "recall@20",
        "best_valid": 0.1,
        "seed": 1,
        "parameters": together.size,
        "seconds_per_epoch": None,
    }
    return paths | measured(folder, paths, record, weights=paths["model"])
