"""Data that grew: the model is shown what is new, row by row, and nothing else; what it said before stays to the bit."""

import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures_extractors import shape
from growing_shop import ALL, CODE, OLD, TITLES, bert, looks, run, shop, shown, texts_of, vectors  # noqa: F401
from repository import ROOT

import extractors
from cm3.common.keys import key_of
from extractors.image import descriptor
from extractors.runtime.cache import cache_address, cached_outputs
from extractors.runtime.earlier_cache import earlier_addresses
from extractors.runtime.shards import notes_of


def test_of_a_tenth_more_texts_the_model_is_shown_the_new_ones_once(
    tmp_path: Path, bert: Path, shown: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "f.parquet"
    record, before = run(texts_of(bert), shop(tmp_path, OLD), output)
    assert (record["kept"], record["encoded"]) == (0, 40)
    shown.clear()
    with caplog.at_level(logging.INFO):
        record, after = run(texts_of(bert), shop(tmp_path, ALL), output)
    # A model may be shown "a" when it loads, by which its dimension is found.
    assert sorted(set(shown) - {"a"}) == sorted(TITLES[one].strip() for one in ALL if one not in OLD)
    assert len(shown) - shown.count("a") == 4
    assert (record["kept"], record["encoded"], record["repeated"]) == (40, 4, 0)
    assert "44 items: 40 cached, 4 encoded" in caplog.text
    assert vectors(before).items() <= vectors(after).items() and after.item_ids == ALL
    _, fresh = run(texts_of(bert), shop(tmp_path / "fresh", ALL), tmp_path / "fresh/f.parquet")
    # The new ones were padded to other neighbours than in a full run: equal up to rounding.
    np.testing.assert_allclose(after.embedding, fresh.embedding, atol=1e-6)
    assert after.metadata == fresh.metadata


def test_the_file_of_grown_images_is_that_of_a_full_rerun(tmp_path: Path, shown: list[Any]) -> None:
    output = tmp_path / "f.parquet"
    run(looks(), shop(tmp_path, OLD), output)
    shown.clear()
    record, _ = run(looks(), shop(tmp_path, ALL), output)
    new = [40 + n for n in range(44) if f"i{n}" not in OLD]
    assert [size for size in shown if size != 8] == new and record["kept"] == 40
    run(looks(), shop(tmp_path / "fresh", ALL), tmp_path / "fresh/f.parquet")
    assert output.read_bytes() == (tmp_path / "fresh/f.parquet").read_bytes()


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Path]], int, int]] = {
    "nothing": (lambda folder: shop(folder, ALL), 0, 0),
    "the order": (lambda folder: shop(folder, ALL[::-1]), 0, 0),
    "fewer items": (lambda folder: shop(folder, ALL[10:30]), 0, 0),
    "a title": (lambda folder: shop(folder, ALL, titles={"i7": "blue bag"}), 1, 0),
    "a title to that of another": (lambda folder: shop(folder, ALL, titles={"i7": TITLES["i8"]}), 0, 0),
    "an image": (lambda folder: shop(folder, ALL, images={"i7": shape("square", "red", 99)}), 0, 1),
    "two images by the same": (
        lambda folder: shop(folder, ALL, images=dict.fromkeys(("i7", "i9"), shape("square", "red", 99))),
        0,
        1,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_encoded_anew(tmp_path: Path, bert: Path, change: str) -> None:
    make, texts, images = CHANGES[change]
    specs = {"words": (texts_of(bert), texts), "looks": (looks(), images)}
    for name, (spec, _) in specs.items():
        run(spec, shop(tmp_path, ALL), tmp_path / f"{name}.parquet")
    for name, (spec, expected) in specs.items():
        record, features = run(spec, make(tmp_path), tmp_path / f"{name}.parquet")
        assert record["encoded"] == expected, name
        assert record["repeated"] == (change == "two images by the same" and name == "looks")
        _, fresh = run(spec, make(tmp_path / "fresh"), tmp_path / f"fresh/{name}.parquet")
        assert features.item_ids == fresh.item_ids
        np.testing.assert_allclose(features.embedding, fresh.embedding, atol=1e-6)


def test_equal_inputs_have_equal_vectors_and_the_model_sees_one(tmp_path: Path, bert: Path, shown: list[Any]) -> None:
    inputs = shop(tmp_path, ALL[:12], titles={"i3": "red pan", "i9": "red pan", "i11": "red pan"})
    record, features = run(texts_of(bert, shard_size=2), inputs, tmp_path / "f.parquet")
    assert shown.count("red pan") == 1 and (record["encoded"], record["repeated"]) == (10, 2)
    assert record["counts"]["ok"] == 12 and len(set(vectors(features).values())) == 10
    assert np.array_equal(features.embedding[3], features.embedding[9])


def test_each_extractor_has_its_own_cache_and_a_swap_back_encodes_nothing(tmp_path: Path, shown: list[Any]) -> None:
    counts = []
    for ids, dtype in ((OLD, "float32"), (OLD, "float16"), (ALL, "float32"), (ALL, "float16"), (ALL, "float32")):
        record, _ = run(looks(dtype=dtype), shop(tmp_path, ids), tmp_path / f"looks-{dtype}.parquet")
        counts.append(record["encoded"])
    assert counts == [40, 40, 4, 4, 0]
    run(looks(dtype="float16"), shop(tmp_path / "fresh", ALL), tmp_path / "fresh/f.parquet")
    assert (tmp_path / "fresh/f.parquet").read_bytes() == (tmp_path / "looks-float16.parquet").read_bytes()


@pytest.mark.parametrize("change", ["version", "settings"])
def test_outputs_of_another_version_or_setting_are_not_used_and_not_deleted(tmp_path: Path, change: str) -> None:
    output = tmp_path / "f.parquet"
    run(looks(), shop(tmp_path, OLD), output)
    spec = looks(dtype="float16") if change == "settings" else looks()
    record, _ = run(spec, shop(tmp_path, ALL), output, code=CODE.replace("1", "2") if change == "version" else CODE)
    assert record["kept"] == 0 and record["encoded"] == 44
    assert len(list((tmp_path / ".cache/f").iterdir())) == 2
    record, _ = run(looks(), shop(tmp_path, OLD), output)
    assert (record["kept"], record["encoded"]) == (40, 0)


def test_without_a_version_of_the_code_nothing_is_cached(tmp_path: Path) -> None:
    for _ in range(2):
        record, _ = run(looks(), shop(tmp_path, OLD), tmp_path / "f.parquet", code="")
        assert record["encoded"] == 40
    assert not (tmp_path / ".cache").exists()


def test_another_library_version_encodes_nothing_again_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "f.parquet"
    monkeypatch.setattr(descriptor.DescriptorSpec, "libraries", ("pillow",))
    record, features = run(looks(), shop(tmp_path, OLD), output)
    now = f"pillow {metadata.version('pillow')}"
    assert record["library_versions"] == features.metadata["library_versions"] == {now: 40}
    assert "different library versions" not in caplog.text
    monkeypatch.setattr("extractors.runtime.job.installed_versions", lambda names: dict.fromkeys(names, "99.0"))
    for _ in range(2):
        record, features = run(looks(), shop(tmp_path, ALL), output)
        assert record["library_versions"] == features.metadata["library_versions"] == {now: 40, "pillow 99.0": 4}
    assert record["kept"] == 44
    assert f"come from different library versions: {now} (40 items), pillow 99.0 (4 items)" in caplog.text
    stored = [notes_of(pq.read_table(path))["library_versions"] for path in (tmp_path / ".cache").rglob("*.parquet")]
    assert sorted(one["pillow"] for one in stored) == sorted([metadata.version("pillow"), "99.0"])


def test_equal_inputs_count_once_each_in_the_library_versions(tmp_path: Path, bert: Path) -> None:
    titles = {"i3": "red pan", "i9": "red pan"}
    record, _ = run(texts_of(bert), shop(tmp_path, ALL[:12], titles=titles), tmp_path / "f.parquet")
    assert record["encoded"] == 11
    assert record["library_versions"] == {
        f"{name} {metadata.version(name)}": 12 for name in ("tokenizers", "torch", "transformers")
    }


@pytest.mark.parametrize("valid", [True, False])
def test_a_cache_of_an_earlier_release_is_taken_over_where_it_is_valid(tmp_path: Path, valid: bool) -> None:
    output = tmp_path / "f.parquet"
    run(looks(), shop(tmp_path, OLD), output)
    (now,) = (tmp_path / ".cache/f").iterdir()
    (address, _) = earlier_addresses("descriptor", looks().identity(), CODE)
    before = tmp_path / ".kept/f" / (address if valid else "0123456789ab")
    before.parent.mkdir(parents=True)
    now.rename(before)
    record, _ = run(looks(), shop(tmp_path, ALL), output)
    assert record["kept"] == (40 if valid else 0) and before.exists() != valid
    record, _ = run(looks(), shop(tmp_path, ALL), output, code=CODE.replace("1", "2"))
    assert record["kept"] == 0


def test_shards_that_an_earlier_release_left_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "f.parquet"
    with monkeypatch.context() as broken:
        breaking(broken, at=2)
        with pytest.raises(OSError, match="went away"):
            run(looks(shard_size=4), shop(tmp_path, ALL), output)
    (folder,) = tmp_path.glob(".f.parquet.shards-*")
    address = earlier_addresses("descriptor", looks().identity(), CODE)[1]
    folder.rename(tmp_path / f".f.parquet.shards-{address}-{folder.name.rpartition('-')[2]}")
    record, _ = run(looks(shard_size=4), shop(tmp_path, ALL), output)
    assert (record["kept"], record["encoded"]) == (8, 36) and not list(tmp_path.glob(".f.parquet.shards-*"))


def test_all_cached_outputs_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "processed/toys/features/image"
    folder.mkdir(parents=True)
    spec = looks()
    output = folder / f"looks-large-{key_of(spec.identity())}.parquet"
    run(spec, shop(tmp_path, OLD), output)
    run(spec, shop(tmp_path, ALL), output)
    run(spec, shop(tmp_path, OLD), output, code="extract 2, descriptor 1")
    found = {one.address: one for one in cached_outputs(tmp_path / "processed")}
    assert found.keys() == {cache_address(spec.identity(), code) for code in (CODE, "extract 2, descriptor 1")}
    one = found[cache_address(spec.identity(), CODE)]
    assert (one.extractor, one.key, one.rows) == ("looks-large", key_of(spec.identity()), 44)
    assert one.bytes == sum(path.stat().st_size for path in one.folder.iterdir()) > 0
    # The list is for a command that lists and removes: it must not load a model library.
    code = "import sys, extractors.runtime.cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def breaking(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the descriptor fail at its run number `at`."""
    run_, number = descriptor.DescriptorExtractor.run, iter(range(99))

    def breaks(self: Any, *arguments: Any) -> Any:
        if next(number) == at:
            raise OSError("the disk went away")
        return run_(self, *arguments)

    monkeypatch.setattr(descriptor.DescriptorExtractor, "run", breaks)


@pytest.mark.parametrize("more", [False, True], ids=["same items", "grown again"])
def test_a_job_that_ended_in_between_loses_only_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    output = tmp_path / "f.parquet"
    run(looks(), shop(tmp_path, ALL[:20]), output)
    with monkeypatch.context() as broken:
        breaking(broken, at=2)
        with pytest.raises(OSError, match="went away"):
            run(looks(shard_size=4), shop(tmp_path, ALL[:40]), output)
    assert not output.exists()
    ids = ALL if more else ALL[:40]
    record, _ = run(looks(shard_size=4), shop(tmp_path, ids), output)
    assert record["encoded"] == len(ids) - 28 and record["kept"] == 28
    run(looks(), shop(tmp_path / "fresh", ids), tmp_path / "fresh/f.parquet")
    assert output.read_bytes() == (tmp_path / "fresh/f.parquet").read_bytes()
    assert not list(tmp_path.glob(".f.parquet.shards-*"))


def test_a_job_that_ended_before_it_cached_its_shards_encodes_nothing_again(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "f.parquet"
    with monkeypatch.context() as broken:
        broken.setattr("extractors.runtime.cache.OutputCache.add", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(texts_of(bert, shard_size=9), shop(tmp_path, ALL), output)
    before = output.read_bytes()
    # Half of them were moved when the power went.
    (folder,) = tmp_path.glob(".f.parquet.shards-*")
    home = tmp_path / ".cache/f" / folder.name.split("-")[1]
    home.mkdir(parents=True)
    for path in sorted(folder.iterdir())[:2]:
        path.replace(home / f"x-{path.name}")
    record, _ = run(texts_of(bert, shard_size=9), shop(tmp_path, ALL), output)
    assert record["encoded"] == 0 and output.read_bytes() == before


def flip(path: Path, part: bytes) -> None:
    """Flip a bit in the stored page that begins with `part`."""
    content = bytearray(path.read_bytes())
    content[content.index(part)] ^= 2
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_cache_file_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    output = tmp_path / "f.parquet"
    _, before = run(looks(shard_size=10), shop(tmp_path, OLD), output)
    path = sorted((tmp_path / ".cache").rglob("*.parquet"))[1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:  # in a vector: the digests of the inputs, which are looked up first, are intact
        flip(path, before.embedding[12].tobytes())
    record, _ = run(looks(), shop(tmp_path, ALL), output)
    assert (record["kept"], record["encoded"]) == (30, 14)
    assert f"{path}: damaged" in caplog.text and not path.exists()
    run(looks(), shop(tmp_path / "fresh", ALL), tmp_path / "fresh/f.parquet")
    assert output.read_bytes() == (tmp_path / "fresh/f.parquet").read_bytes()
    caplog.clear()
    record, _ = run(looks(), shop(tmp_path, ALL), output)
    assert record["encoded"] == 0 and not caplog.text


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "swap"])
def test_a_damaged_shard_of_an_unfinished_job_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    output = tmp_path / "f.parquet"
    _, fresh = run(looks(), shop(tmp_path / "fresh", ALL), tmp_path / "fresh/f.parquet")
    with monkeypatch.context() as broken:
        breaking(broken, at=2)
        with pytest.raises(OSError, match="went away"):
            run(looks(shard_size=4), shop(tmp_path, ALL), output)
    first, second = sorted(tmp_path.glob(".f.parquet.shards-*/*.parquet"))
    if damage == "flip":
        flip(first, fresh.embedding[0].tobytes())
    elif damage == "swap":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        first.write_bytes(first.read_bytes()[:-1] if damage == "cut" else b"")
    record, _ = run(looks(shard_size=4), shop(tmp_path, ALL), output)
    assert record["encoded"] == (44 if damage == "swap" else 40)
    assert f"{first}: damaged" in caplog.text
    assert output.read_bytes() == (tmp_path / "fresh/f.parquet").read_bytes()


def test_what_is_only_looked_up_is_not_stored_twice(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(44, dtype=np.float32))
    (tmp_path / "ids.txt").write_text("".join(f"{one}\n" for one in ALL))
    data = {"modality": "sound", "backend": "precomputed", "path": str(tmp_path / "v.npy")}
    spec = extractors.parse_extractor("v", data | {"ids": str(tmp_path / "ids.txt")}, "extractors.v")
    record, features = run(spec, shop(tmp_path, OLD), tmp_path / "f.parquet")
    assert record["encoded"] == 40 and features.embedding.sum() == 40 and not (tmp_path / ".cache").exists()
