"""Pruning lists what no experiment uses, keeps everything else, and deletes only on request."""

import copy
import fcntl
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import SMALL

from cm3.common.errors import UserError
from extractors.runtime.cache import cache_address
from workflow.plan import features, runs
from workflow.plan.config import Config, load_config
from workflow.prune import Unused, delete, paths_in, prune, read_config, table, unused, used_by


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the small configuration."""
    monkeypatch.chdir(tmp_path)
    write(Path("config/config.yaml"), yaml.safe_dump(SMALL, sort_keys=False))
    return tmp_path


def write(path: Path | str, text: str = "1234567890") -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def configured(**experiments: Any) -> Config:
    whole = copy.deepcopy(SMALL)
    whole["experiments"] |= experiments
    return load_config(whole)


def listed(config: Config) -> set[str]:
    return {str(entry.path) for entry in unused(config, used_by(config))}


def make_everything(config: Config, experiment: str) -> set[Path]:
    """Write files at all paths of an experiment: features, graphs, caches, and its run."""
    settings = config.experiments[experiment]
    made = {write(runs.run_folder(config, experiment) + "/model.safetensors")}
    for path in (*runs.features_of(config, settings).values(), *runs.graphs_of(config, settings).values()):
        made |= {write(path), write(features.record_path(path))}
    for modality, extractor in settings.modalities.items():
        identity, task = features.extractor_identity(config, extractor), features.extract(config, extractor)
        output = Path(features.features_path(config, settings.dataset, extractor))
        made.add(write(output.parent / ".cache" / output.stem / cache_address(identity, task.version) / "a.parquet"))
        graph = Path(runs.graphs_of(config, settings)[modality])
        made.add(write(graph.parent / ".kept" / graph.name))
    return made


def test_what_experiments_and_studies_use_is_not_listed():
    whole = copy.deepcopy(SMALL)
    whole["experiments"]["noise"] = {"like": "shop", "control": "gaussian"}
    whole["studies"] = {"compared": {"experiments": ["shop", "noise"], "seeds": [1, 2]}}
    config = load_config(whole)
    for name in ("shop", "noise"):
        make_everything(config, name)
        for run, settings in runs.runs_of(config, name).items():
            write(f"results/{name}/runs/{run}/model.safetensors")
            for path in runs.features_of(config, settings).values():
                write(path)
    assert listed(config) == set()


def test_what_nothing_uses_is_listed_by_kind_with_its_record_and_shards():
    config = configured()
    make_everything(config, "shop")
    stem = "processed/shop/features/text/old-0123456789ab"
    write(f"{stem}.parquet"), write(f"{stem}.stage.json")
    write("processed/shop/features/text/.old-0123456789ab.parquet.shards-00-11/000000.parquet")
    write(f"{stem}-shuffled-42.parquet")
    write("processed/gone/captions/sayer-0123456789ab.parquet")
    write("processed/shop/similarity/old-0123456789ab-k10-hnsw.parquet")
    write("processed/shop/similarity/.kept/old-0123456789ab-k10-hnsw.parquet")
    write("processed/shop/features/text/.cache/old-0123456789ab/111111111111/a.parquet")
    words = Path(features.features_path(config, "shop", "words"))
    write(words.parent / ".cache" / words.stem / "222222222222/a.parquet")
    write("results/shop/runs/0123456789ab/model.safetensors")
    write("results/gone/runs/0123456789ab/model.safetensors")
    entries = {str(entry.path): entry for entry in unused(config, used_by(config))}
    assert {path: entry.kind for path, entry in entries.items()} == {
        f"{stem}.parquet": "features",
        f"{stem}-shuffled-42.parquet": "features",
        "processed/gone/captions/sayer-0123456789ab.parquet": "captions",
        "processed/shop/similarity/old-0123456789ab-k10-hnsw.parquet": "similarity",
        "processed/shop/similarity/.kept/old-0123456789ab-k10-hnsw.parquet": "cache",
        "processed/shop/features/text/.cache/old-0123456789ab/111111111111": "cache",
        f"{words.parent}/.cache/{words.stem}/222222222222": "cache",
        "results/shop/runs/0123456789ab": "run",
        "results/gone/runs/0123456789ab": "run",
    }
    assert entries[f"{stem}.parquet"].bytes == 30


def test_splits_that_no_study_repeats_are_listed():
    whole = copy.deepcopy(SMALL)
    whole["studies"] = {"compared": {"experiments": ["shop"], "split": {"repeats": 2}}}
    seed = load_config(whole).datasets["shop"].split_spec()["seed"]
    for further in (seed + 1, seed + 2):
        write(f"processed/shop/splits/{further}/interactions.parquet")
        write(f"processed/shop/splits/{further}/split.stage.json")
        write(f"processed/shop/splits/{further}/notes.txt")
    config = load_config(whole)
    (entry,) = unused(config, used_by(config))
    assert (entry.kind, str(entry.path)) == ("split", f"processed/shop/splits/{seed + 2}/interactions.parquet")
    assert entry.bytes == 20


def test_raw_files_tables_images_results_and_files_of_the_user_are_never_listed():
    kept = [
        "raw/shop/reviews.json.gz",
        "processed/shop/items.parquet",
        "processed/shop/images/shard-00000.parquet",
        "processed/gone/images/manifest.parquet",
        "processed/shop/features/text/mine.parquet",
        "processed/shop/features/text/old-0123456789ab.csv",
        "processed/shop/similarity/notes.parquet",
        "processed/.snakemake-metadata/abc",
        "results/gone/metrics.json",
        "results/shop/model.safetensors",
        "results/shop/runs/notes/text.md",
    ]
    for path in kept:
        write(path)
    assert listed(configured()) == set()


def test_files_of_a_user_in_a_run_stay():
    for name in ("model.safetensors", "checkpoints/last.pt", "tensorboard/events.1", "notes.md", "plots/mine.png"):
        write(f"results/shop/runs/0123456789ab/{name}")
    write("results/shop/runs/111111111111/history.csv")
    entries = unused(configured(), used_by(configured()))
    assert [entry.kind for entry in entries] == ["run", "run"]
    delete(entries)
    assert sorted(str(path) for path in Path("results/shop/runs").rglob("*") if path.is_file()) == [
        "results/shop/runs/0123456789ab/notes.md",
        "results/shop/runs/0123456789ab/plots/mine.png",
    ]
    assert not Path("results/shop/runs/111111111111").exists()
    assert listed(configured()) == set()


def test_a_path_that_the_configuration_names_is_kept():
    write("results/shop/runs/0123456789ab/model.safetensors")
    write("processed/shop/features/text/old-0123456789ab.parquet")
    config = configured()
    mentioned = paths_in({"a": ["results/shop/runs/0123456789ab", 3], "b": {"c": "$NOWHERE/x", "d": "no/such"}})
    assert mentioned == {Path("results/shop/runs/0123456789ab")}
    found = {str(entry.path) for entry in unused(config, used_by(config), mentioned)}
    assert found == {"processed/shop/features/text/old-0123456789ab.parquet"}


def test_an_extractor_without_a_key_here_and_its_runs_are_kept():
    whole = copy.deepcopy(SMALL)
    whole["extractors"]["words"] = {"modality": "text", "backend": "transformers-text", "weights": "no/such/folder"}
    config = load_config(whole)
    write("processed/shop/features/text/words-0123456789ab.parquet")
    write("processed/shop/features/text/.cache/words-0123456789ab/111111111111/a.parquet")
    write("results/shop/runs/0123456789ab/model.safetensors")
    write("processed/shop/features/text/old-0123456789ab.parquet")
    assert listed(config) == {"processed/shop/features/text/old-0123456789ab.parquet"}
    assert "no/such/folder" in used_by(config).unknown["words"]


def test_files_are_deleted_on_request_only():
    made = make_everything(configured(), "shop")
    old = write("processed/shop/features/text/old-0123456789ab.parquet")
    run = write("results/shop/runs/0123456789ab/model.safetensors")
    report = prune([], deletes=False)
    assert "Nothing was deleted. To delete it: ./run prune --delete" in report
    assert old.exists() and run.exists()
    report = prune([], deletes=True)
    assert f"10 B  features    {old}" in report and "20 B  in 2 entries" in report
    assert not old.exists() and not run.parent.exists()
    assert all(path.exists() for path in made)
    assert prune([], deletes=True) == "Nothing is unused under config/config.yaml."


def test_config_files_are_read_as_by_snakemake():
    more = write("more.yaml", "experiments: {second: {like: shop, training: {seed: 7}}}")
    raw = read_config([more])
    assert set(raw["experiments"]) == {"shop", "second"} and set(raw["extractors"]) == set(SMALL["extractors"])
    second = runs.run_folder(load_config(raw), "second")
    write(f"{second}/model.safetensors")
    assert second in prune([], deletes=False)
    assert prune([more], deletes=True) == "Nothing is unused under config/config.yaml, more.yaml."
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read"):
        read_config([Path("absent.yaml")])
    with pytest.raises(UserError, match=r"list\.yaml: is not a mapping"):
        read_config([write("list.yaml", "- 1")])


def test_nothing_is_deleted_while_a_run_works_in_the_folder():
    old = write("processed/shop/features/text/old-0123456789ab.parquet")
    with write("processed/.run.lock", "process 12345").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            prune([], deletes=True)
        assert str(old) in prune([], deletes=False)
    assert old.exists()


def test_sizes_are_readable():
    for size, text in ((999, "999 B"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (3 * 10**12, "3.0 TB")):
        path = Path("large")
        with path.open("wb") as file:
            file.truncate(size)
        assert text in table([Unused("run", path, [path])])
