"""Arrays in temporary files: what is free, what is said when nothing is, and stages that do not notice."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import training_shop
from training_shop import one_thread, shop  # noqa: F401

from cm3.common import arrays
from cm3.common.arrays import free_memory, keep_rows, mean_of_rows, rows_not_finite, zeros
from cm3.common.errors import UserError
from cm3.common.features import read_features, write_features
from cm3.similarity.stage import similarity


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lay every array into a file in a folder of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(arrays, "free_memory", lambda: 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mapped(x: np.ndarray) -> bool:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return isinstance(x, np.memmap)


def test_an_array_is_in_memory_while_there_is_room():
    array = zeros((3, 4))
    assert not mapped(array) and array.dtype == np.float32 and not array.any()


def test_a_large_array_is_in_a_file_without_a_name(no_memory: Path):
    array = zeros((1000, 7), np.int16)
    assert mapped(array) and array.shape == (1000, 7) and array.dtype == np.int16 and not array.any()
    array[:] = np.arange(7)
    assert array[999].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not list(no_memory.iterdir())


def test_a_full_disk_is_named_before_anything_is_computed(no_memory: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"no room for 4\.0 GB of vectors; set TMPDIR to a folder on a disk that has it"
    ):
        zeros((1_000_000, 1000))


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/job", {"job/memory.max": "5000000", "job/memory.stat": "anon 1000000\nfile 9"}),
        (
            "0::/job/step",
            {"job/memory.max": "5000000", "job/memory.stat": "anon 1000000", "job/step/memory.max": "max"},
        ),
        ("0::/not/seen/here", {"memory.max": "5000000", "memory.stat": "anon 1000000"}),
        (
            "3:cpu:/a\n2:memory:/job",
            {"memory/job/memory.limit_in_bytes": "5000000", "memory/job/memory.stat": "total_rss 1000000"},
        ),
    ],
)
def test_a_limit_of_the_jobs_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str]
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(group + "\n")
    monkeypatch.setattr(arrays, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(arrays, "CGROUP_MEMBERSHIP", tmp_path / "own")
    assert free_memory() == 4_000_000.0


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrays, "CGROUP_ROOT", tmp_path)
    assert free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_rows_by_blocks_are_what_they_are_at_once(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 3)).astype(np.float32)
    x[[5, 9000, 19_999], 1] = [np.nan, np.inf, -np.inf]
    assert np.flatnonzero(rows_not_finite(x)).tolist() == [5, 9000, 19_999]
    chosen = rng.random(20_000) < 0.7
    chosen[[5, 9000, 19_999]] = False
    np.testing.assert_allclose(mean_of_rows(x, chosen), x[chosen].mean(0, dtype=np.float64), rtol=1e-12)
    expected = x[chosen]
    assert np.array_equal(keep_rows(x, np.flatnonzero(chosen)), expected)


@pytest.mark.parametrize("missing", ["drop", "mean"])
def test_neighbours_of_vectors_past_memory_are_the_same_bytes(tmp_path: Path, request, missing: str):
    rng = np.random.default_rng(1)
    vectors, status = rng.normal(size=(500, 16)).astype(np.float32), np.where(rng.random(500) < 0.1, "missing", "ok")
    path = tmp_path / "features.parquet"
    write_features(path, [f"i{row}" for row in range(500)], vectors, status.tolist(), {})
    similarity(features=path, output=tmp_path / "a.parquet", knn_k=5, missing=missing)
    request.getfixturevalue("no_memory")
    assert mapped(read_features(path).embedding)
    similarity(features=path, output=tmp_path / "b.parquet", knn_k=5, missing=missing)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_vectors_past_memory_gives_the_same_bytes(shop, tmp_path: Path, request, precision: str):
    training = {"epochs": 2, "precision": precision, "tensorboard": False}
    training_shop.run(shop, tmp_path / "a", training=training)
    request.getfixturevalue("no_memory")
    training_shop.run(shop, tmp_path / "b", training=training)
    assert training_shop.written(tmp_path / "a") == training_shop.written(tmp_path / "b")
