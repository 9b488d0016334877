"""Files that were changed, cut, deleted or made for other settings are noticed, and made again by the same command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from checkout import METRICS, SMALL, Checkout, changed, environment

from cm3.common.files import read_json

FROM_SPLIT = {"split": 1, "train": 1, "evaluate": 1, "publish": 1}


@pytest.fixture
def checkout(finished_checkout: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout that a test may damage."""
    return finished_checkout.clone(tmp_path / "copy")


def cut(path: Path) -> None:
    """Cut a file to half its length and keep its times."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[: status.st_size // 2])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(path: Path) -> None:
    """Flip a bit in the first column of a table and keep its times."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


CUT = {
    "results/shop/per_user.parquet": "publish",
    "results/shop/model.safetensors": "publish",
    "results/shop/runs/*/item_embeddings.parquet": "train",
    "results/shop/runs/*/evaluation.json": "evaluate",
    "processed/shop/split.stage.json": "split",
    "processed/shop/items.parquet": "prepare",
    "processed/shop/images/shard-00000.parquet": "images",
    "processed/shop/similarity/words-*.parquet": "similarity",
    "processed/shop/features/image/*.parquet": "extract",
}


def test_files_cut_to_half_are_made_again(checkout: Checkout):
    for pattern in CUT:
        cut(one(checkout.folder, pattern))
    output = checkout.dry_run(METRICS)
    for pattern, rule in CUT.items():
        name = one(checkout.folder, pattern).relative_to(checkout.folder)
        assert f"WARNING: {name} is not the file that the workflow made; it is made again where it is needed" in output
        assert f"rule {rule}:" in output


def test_metrics_cut_to_half_are_published_again(checkout: Checkout):
    cut(checkout.folder / METRICS)
    assert checkout.planned(METRICS) == {"publish": 1}


@pytest.mark.parametrize(
    "deleted", ["results/shop/recommendations.parquet", "processed/shop/images/shard-00000.parquet"]
)
def test_a_deleted_file_that_belongs_to_others_is_made_again(checkout: Checkout, deleted: str):
    (checkout.folder / deleted).unlink()
    assert checkout.planned(METRICS)


def test_features_deleted_to_save_space_rerun_nothing(checkout: Checkout):
    for path in (checkout.folder / "processed/shop/features").rglob("*.parquet"):
        path.unlink()
    assert checkout.planned(METRICS) == {}


def test_a_file_restored_from_a_backup_is_up_to_date(checkout: Checkout, tmp_path: Path):
    path = checkout.folder / "processed/shop/interactions.parquet"
    shutil.copyfile(path, tmp_path / "backup")
    cut(path)
    assert checkout.planned(METRICS)["split"] == 1
    shutil.copyfile(tmp_path / "backup", path)
    assert checkout.planned(METRICS) == {}


def test_damage_gives_the_same_results_again(checkout: Checkout):
    """A cut shard is noticed before the run; a flipped bit, of unchanged time and size, by the stage that reads it."""
    before = {path: path.read_bytes() for path in (checkout.folder / "processed").rglob("*.parquet")}
    metrics = read_json(checkout.folder / METRICS)["test"]
    assert checkout.planned(METRICS) == {}, "this reads the files of the copy once"
    cut(checkout.folder / "processed/shop/images/shard-00000.parquet")
    flip(checkout.folder / "processed/shop/interactions.parquet")
    checkout.configure(changed(experiments__shop__evaluation={"ks": [5, 10, 20]}))
    output = checkout.run(METRICS, check=False)
    assert "processed/shop/interactions.parquet: damaged" in output
    assert "It is marked: run the same command again, which makes the file anew" in output
    assert "Traceback" not in output
    checkout.run(METRICS)
    assert {path: path.read_bytes() for path in before} == before
    now = read_json(checkout.folder / METRICS)["test"]
    assert {name: now[name] for name in metrics} == metrics
    assert checkout.planned(METRICS) == {}


@pytest.mark.parametrize("content", ["", '{"rule": "split", "par'])
def test_a_damaged_record_does_not_hide_a_changed_seed(checkout: Checkout, content: str):
    name = urlsafe_b64encode(b"processed/shop/interactions.parquet").decode()
    (checkout.folder / "processed/.snakemake-metadata" / name).write_text(content)
    assert checkout.planned(METRICS) == {}
    (checkout.folder / "processed/.snakemake-metadata" / name).write_text(content)
    checkout.configure(changed(datasets__shop__split={"seed": 9}))
    assert checkout.planned(METRICS) == FROM_SPLIT


def label(checkout: Checkout, seed: int) -> None:
    """Write interactions.parquet of another seed as a job does that is killed before anything else is written."""
    spec = json.dumps({"keep": None, "seed": seed, "strategy": "random"})
    command = [sys.executable, "-m", "cm3.datasets.label", "--spec", spec]
    command += ["--input", "ratings=processed/shop/ratings.parquet"]
    command += ["--output", "interactions=processed/shop/interactions.parquet"]
    subprocess.run(command, cwd=checkout.folder, env=environment(), check=True)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_split_of_another_seed_without_a_record_is_noticed(checkout: Checkout, fresh: bool):
    label(checkout, 9)
    if fresh:
        shutil.rmtree(checkout.folder / ".snakemake")
    assert checkout.planned(METRICS) == FROM_SPLIT


def test_two_checkouts_with_other_seeds_share_the_data_in_turn(checkout: Checkout, tmp_path: Path):
    second = Checkout(tmp_path / "second", changed(datasets__shop__split={"seed": 9}), root=checkout.folder)
    (second.folder / "processed").symlink_to(checkout.folder / "processed")
    (second.folder / "raw").symlink_to(checkout.folder / "raw")
    assert second.planned("processed/shop/interactions.parquet") == {"split": 1}
    second.run("processed/shop/interactions.parquet")
    assert checkout.planned(METRICS) == FROM_SPLIT


def test_a_second_run_on_the_same_data_is_refused(checkout: Checkout, tmp_path: Path):
    log = one(checkout.folder, "logs/shop/train-*.log")
    log.unlink()
    checkout.hold("checkpoint")
    second = Checkout(tmp_path / "second", SMALL, root=checkout.folder)
    for folder in ("processed", "raw"):
        (second.folder / folder).symlink_to(checkout.folder / folder)
    first = checkout.start("-R", "train", "--", METRICS)
    try:
        while first.poll() is None and not log.exists():
            time.sleep(0.05)
        output = second.run(METRICS, check=False)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert "another run (process" in output and str(checkout.folder / "processed") in output


def test_data_and_state_can_be_links_to_another_disk(tmp_path: Path):
    checkout = Checkout(tmp_path / "linked")
    for name in (".snakemake", "processed", "results", "raw"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (checkout.folder / name).symlink_to(tmp_path / "disk" / name)
    target = "processed/shop/interactions.parquet"
    checkout.run(target)
    assert checkout.planned(target) == {}
    shutil.rmtree(tmp_path / "disk/.snakemake")
    (tmp_path / "disk/.snakemake").mkdir()
    assert checkout.planned(target) == {}
