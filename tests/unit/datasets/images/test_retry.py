"""Image download after kills and in reruns: the same bytes, and requests for unknown outcomes only."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import image_server
import pyarrow.parquet as pq
import pytest
from oracles_sources import image, in_turn, items_file, respond, serving
from repository import ROOT

from cm3.common.images import iter_images
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images

RUNTIME = {"rate": 1e6, "concurrency": 4, "attempts": 3, "pause": 0.01, "timeout": 60.0, "threads": 2}


def spec(**more: Any) -> dict[str, Any]:
    return Images(**{"hosts": ["127.0.0.1"], "private": True, **more}).spec()


def collect(folder: Path, references: dict[str, Any], shard_bytes: int = 10**6, **settings: Any) -> dict[str, Any]:
    """Run the stage; return its facts."""
    items = items_file(folder / "items.parquet", references)
    return collect_images(spec(**settings), RUNTIME, items, {}, folder / "out" / "manifest.parquet", shard_bytes)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["item_id"]: row for row in read_table(folder / "out" / "manifest.parquet", MANIFEST).to_pylist()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that the stage left, hidden ones too."""
    return {str(p.relative_to(folder / "out")): p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}


def images_of(folder: Path) -> list[tuple[int, bytes]]:
    """Items and their images in the order in which extractors read them."""
    return list(iter_images(folder / "out" / "manifest.parquet"))


@pytest.fixture(scope="module")
def shop() -> Iterator[image_server.Address]:
    with image_server.running("--sizes", "40", "60", "--kinds", "20", "--delay", "0.002") as address:
        yield address


def items_of(shop: image_server.Address, numbers: range) -> dict[str, list[str]]:
    """One image an item; each third has a second address, which it needs where the first gives nothing."""
    return {f"i{n}": [shop.url(n), *([shop.url(n + 50)] if n % 3 == 0 else [])] for n in numbers}


def stage(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    out = folder / "out"
    arguments = [
        "--spec",
        json.dumps(spec()),
        "--runtime",
        json.dumps(RUNTIME),
        "--input",
        f"items={folder / 'items.parquet'}",
        "--output",
        f"manifest={out / 'manifest.parquet'}",
        "--output",
        f"record={out / 'images.stage.json'}",
    ]
    return subprocess.Popen(
        [sys.executable, *command, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "no_proxy": "*"}
    )


def killed_when(folder: Path, ready: Callable[[], bool]) -> bool:
    """Run the stage and SIGKILL it as soon as `ready`; whether that was before it ended."""
    process = stage(folder, "-m", "cm3.datasets.images.stage")
    try:
        while process.poll() is None:
            if ready():
                break
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.integration
def test_random_kills_give_the_same_bytes(shop: image_server.Address, tmp_path: Path):
    references = items_of(shop, range(1000, 1600))
    collect(tmp_path / "whole", references)
    before = shop.asked()
    folder = tmp_path / "killed"
    items_file(folder / "items.parquet", references)
    journal, fresh = folder / "out" / ".downloads" / "journal", folder / "out" / ".fresh"
    chance, total = random.Random(5), sum(row["shard"] is not None for row in rows_of(tmp_path / "whole").values())
    sizes = sorted(chance.random() * total * 1000 for _ in range(5))
    missed: Counter[int] = Counter()
    moments: list[Callable[[], bool]] = [lambda least=least: size(journal) > least for least in sizes]  # type: ignore[misc]
    moments += [
        lambda: any(fresh.glob(".shard-*.part")),
        lambda: (fresh / "shard-00000.parquet").exists(),
        lambda: (fresh / "manifest.parquet").exists(),
    ]
    kills = 0
    for moment in moments:
        for _ in range(10):  # A busy machine may miss a moment. The run is then undone and repeated.
            asked = Counter(shop.asked())
            shutil.copytree(folder, tmp_path / "before", dirs_exist_ok=True)
            killed = killed_when(folder, moment)
            kills += killed
            if killed:
                break
            missed += Counter(shop.asked()) - asked
            shutil.rmtree(folder)
            (tmp_path / "before").rename(folder)
        shutil.rmtree(tmp_path / "before", ignore_errors=True)
    assert kills >= 6
    (folder / "out" / "manifest.parquet").unlink(missing_ok=True)
    assert stage(folder, "-m", "cm3.datasets.images.stage").wait() == 0
    ours, theirs = files_of(folder), files_of(tmp_path / "whole")
    assert {name for name in ours if not name.startswith(".")} == {
        "images.stage.json",
        "manifest.parquet",
        "shard-00000.parquet",
    }
    for name, data in theirs.items():
        assert ours[name] == data, name
    # All faults that come once came in the first run, so one request each is all there should be.
    again = Counter(shop.asked()) - Counter(before) - Counter(dict.fromkeys(before, 1)) - missed
    assert sum(again.values()) <= kills * 2 * RUNTIME["concurrency"], again


KILLER = """
import os, pathlib, shutil, signal, sys
import aiohttp, pyarrow.parquet, cm3.datasets.images.stage, cm3.datasets.images.web

def deadly(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

base, kill, status = sys.argv.pop(1), 0, 1
while status:
    kill += 1
    shutil.copytree(base, f"{base}{kill}")
    child = os.fork()
    if child == 0:
        left = kill
        for name in ('replace', 'rename', 'unlink'):
            setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
        os.unlink, os.rmdir = deadly(os.unlink), deadly(os.rmdir)
        cm3.datasets.images.stage.collect_images.__defaults__ = (30_000, None)
        sys.argv = [word.replace(base, f"{base}{kill}") for word in sys.argv]
        cm3.datasets.images.stage.main()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
"""


@pytest.mark.integration
def test_kills_before_each_file_change_give_the_same_bytes(shop: image_server.Address, tmp_path: Path):
    # A rerun with other items: old shards and new ones, several of each, and some of the old go.
    earlier, later = items_of(shop, range(2000, 2100)), items_of(shop, range(2010, 2110))
    base = tmp_path / "base"
    collect(base, earlier, 30_000)
    shutil.copytree(base, tmp_path / "whole")
    facts = collect(tmp_path / "whole", later, 30_000)
    assert 1 <= facts["shards_kept"] < facts["shards"] - 1, "some stay, one loses an image, some are new"
    items_file(base / "items.parquet", later)
    whole = files_of(tmp_path / "whole")
    collect(tmp_path / "fresh", later, 30_000)
    assert images_of(tmp_path / "whole") == images_of(tmp_path / "fresh")
    before = Counter(shop.asked())
    assert stage(base, "-c", KILLER, str(base)).wait() == 0
    folders = sorted(tmp_path.glob("base?*"))
    for folder in folders:
        collect(folder, later, 30_000)
        ours = files_of(folder)
        assert {name: ours.get(name) for name in whole} == whole, folder
        assert {name for name in ours if not name.startswith((".manifest", ".images", "images"))} == set(whole), folder
    asked = Counter(shop.asked()) - before
    # 2017 is truncated, so every rerun asks for it, twice where the first died after it was done. So is 2016, but its
    # item has another image. All else below 2100 is known.
    assert {n for n in asked if n < 2100} == {2017}
    new = [count for number, count in asked.items() if number >= 2100]
    assert set(new) == {len(folders)} and max(asked.values()) <= len(folders) + 10
    assert len(folders) > 15


def test_a_rerun_requests_failures_only(shop: image_server.Address, tmp_path: Path):
    references = items_of(shop, range(3000, 3100))
    first = collect(tmp_path, references, 40_000)
    assert first["images_known_before"] == 0 and first["images_failed"] > 0
    files, before = files_of(tmp_path), Counter(shop.asked())
    (tmp_path / "out" / "manifest.parquet").unlink()
    second = collect(tmp_path, references, 40_000)
    asked = Counter(shop.asked()) - before
    failed = [name for name, row in rows_of(tmp_path).items() if row["status"] == "failed"]
    assert failed and asked == {int(name[1:]): 1 for name in failed}
    assert files_of(tmp_path) == files
    assert second["images_known_before"] == second["images_ok"] == first["images_ok"]


def test_a_repaired_image_is_added(tmp_path: Path):
    good, other = image(), image(colour="blue")
    with serving() as server:
        server.answers = {"/a": respond(good), "/b": in_turn(respond(other[:300]), respond(other))}
        references = {name: [server.url(f"/{name}")] for name in "abc"}
        collect(tmp_path / "again", references)
        assert [row["status"] for row in rows_of(tmp_path / "again").values()] == ["ok", "failed", "missing"]
        collect(tmp_path / "again", references)
        assert server.asked == ["/a", "/b", "/c", "/b"] or sorted(server.asked) == ["/a", "/b", "/b", "/c"]
        collect(tmp_path / "once", references)
    assert images_of(tmp_path / "again") == images_of(tmp_path / "once")
    assert dict(iter_images(tmp_path / "again" / "out" / "manifest.parquet")) == {0: good, 1: other}


def test_an_item_keeps_its_image(tmp_path: Path):
    first, second = image(), image(colour="blue")
    with serving() as server:
        server.answers = {"/a": in_turn(respond(first[:300]), respond(first)), "/b": respond(second)}
        references = {"x": [server.url("/a"), server.url("/b")]}
        for _ in range(2):
            collect(tmp_path, references)
            assert rows_of(tmp_path)["x"]["url"] == server.url("/b") and sorted(server.asked) == ["/a", "/b"]
        # An item that has nothing else does ask again, and then the image is there for both.
        collect(tmp_path, {**references, "y": references["x"][:1]})
        assert {row["url"] for row in rows_of(tmp_path).values()} == {server.url("/a")}
        assert sorted(server.asked) == ["/a", "/a", "/b"]


def test_new_settings_apply_to_known_outcomes(tmp_path: Path):
    good, large = image(), image((400, 300), colour="noise")
    with serving() as server:
        server.answers = {
            "/a": respond(good),
            "/b": respond(large),
            "/c": respond(b"", 302, Location=server.url("/a").replace("127.0.0.1", "localhost")),
        }
        references = {name: [server.url(f"/{name}")] for name in "abc"}
        both = {"hosts": ["127.0.0.1", "localhost"]}
        collect(tmp_path, references, **both)
        digest = rows_of(tmp_path)["a"]["sha256"]
        server.asked.clear()

        def statuses(**settings: Any) -> list[str]:
            collect(tmp_path, references, **{**both, **settings})
            return [row["status"] for row in rows_of(tmp_path).values()]

        assert statuses() == ["ok", "ok", "ok"]
        assert statuses(placeholders=[digest]) == ["missing", "ok", "missing"] and server.asked == []
        assert statuses(placeholders=[]) == ["ok", "ok", "ok"] and sorted(server.asked) == ["/a", "/a", "/c"]
        assert statuses(max_pixels=2000) == ["ok", "failed", "ok"] and server.asked[3:] == ["/b"]
        assert statuses(max_bytes=5000) == ["ok", "failed", "ok"]
        assert statuses() == ["ok", "ok", "ok"]
        assert statuses(hosts=["127.0.0.1"]) == ["ok", "ok", "failed"]
        assert "localhost is not in images.hosts" in rows_of(tmp_path)["c"]["error"]


def spoil(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["image", "footer", "known", "gone"])
def test_damaged_files_are_downloaded_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    images = {name: image(colour=name) for name in ("red", "blue", "green")}
    with serving() as server:
        server.answers = {f"/{name}": respond(data) for name, data in images.items()}
        references = {name: [server.url(f"/{name}")] for name in images}
        collect(tmp_path, references)
        files, shard = files_of(tmp_path), tmp_path / "out" / "shard-00000.parquet"
        server.asked.clear()
        if damage == "gone":
            shard.unlink()
        elif damage == "image":
            spoil(shard, shard.read_bytes().index(images["blue"]) + 200)
        else:
            spoil(shard if damage == "footer" else tmp_path / "out" / ".known.parquet", -10)
        collect(tmp_path, references)
        assert sorted(server.asked) == (["/blue"] if damage == "image" else ["/blue", "/green", "/red"])
    assert files_of(tmp_path) == files
    assert {
        "image": r"shard-00000.parquet: damaged (1 images are not those that were stored)",
        "footer": r"shard-00000.parquet: damaged (its page headers or its footer do not match their checksum)",
        "known": r".known.parquet: damaged",
        "gone": "out: 3 images are in none of its shards any more; they are downloaded again",
    }[damage] in caplog.text


def test_a_damaged_image_that_cannot_be_had_again_failed(tmp_path: Path):
    images = {name: image(colour=name) for name in ("red", "blue", "green")}
    with serving() as server:
        server.answers = {f"/{name}": respond(data) for name, data in images.items()}
        references = {name: [server.url(f"/{name}")] for name in images}
        collect(tmp_path, references)
        shard = tmp_path / "out" / "shard-00000.parquet"
        spoil(shard, shard.read_bytes().index(images["blue"]) + 200)
        server.answers["/blue"] = respond(b"", 503)
        collect(tmp_path, references)
    rows = rows_of(tmp_path)
    assert {name: row["status"] for name, row in rows.items()} == {"red": "ok", "blue": "failed", "green": "ok"}
    assert "HTTP 503" in rows["blue"]["error"]
    assert dict(iter_images(tmp_path / "out" / "manifest.parquet")) == {0: images["red"], 2: images["green"]}


def test_a_damaged_journal_is_read_up_to_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("red", "blue", "green", "teal")
    with serving() as server:
        server.answers = {f"/{name}": respond(image(colour=name)) for name in names}
        references = {name: [server.url(f"/{name}")] for name in (*names, "none")}
        collect(tmp_path / "whole", references)
        with monkeypatch.context() as patch:
            patch.setattr("cm3.datasets.images.stage.put_in_place", stop)
            with pytest.raises(InterruptedError):
                collect(tmp_path, references)
        journal = tmp_path / "out" / ".downloads" / "journal"
        data = journal.read_bytes()
        chance = random.Random(3)
        cuts = [data[:cut] for cut in (0, 1, len(data) - 1, *(chance.randrange(len(data)) for _ in range(6)))]
        holes = [
            data[:at] + bytes(60) + data[at + 60 :] for at in (0, *(chance.randrange(len(data)) for _ in range(6)))
        ]
        for damaged in (*cuts, *holes, data + b"\0" * 5000, data + data[:100]):
            shutil.rmtree(tmp_path / "out")
            journal.parent.mkdir(parents=True)
            journal.write_bytes(damaged)
            server.asked.clear()
            collect(tmp_path, references)
            assert files_of(tmp_path) == files_of(tmp_path / "whole")
            assert len(server.asked) == len(set(server.asked)) < 6 and (len(damaged) <= len(data) or not server.asked)


def stop(*_: Any) -> None:
    raise InterruptedError


def test_other_settings_after_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving() as server:
        server.answers = {"/a": respond(image()), "/b": respond(image((200, 200))), "/down": respond(b"", 503)}
        references = {name: [server.url(f"/{name}")] for name in ("a", "b", "down")}
        for settings, asked in (({"max_pixels": 2000}, 5), ({"max_pixels": 2000}, 8), ({}, 12)):
            with monkeypatch.context() as patch:
                patch.setattr("cm3.datasets.images.stage.put_in_place", stop)
                with pytest.raises(InterruptedError):
                    collect(tmp_path, references, **settings)
            # A server that was down is asked in each run, thrice; /b only where its size is no fault any more.
            assert len(server.asked) == asked
        collect(tmp_path, references)
    assert [row["status"] for row in rows_of(tmp_path).values()] == ["ok", "ok", "failed"]


def test_earlier_images_in_another_order(tmp_path: Path, shop: image_server.Address):
    references = items_of(shop, range(4100, 4190))
    collect(tmp_path, references, 30_000)
    shuffled = dict(random.Random(1).sample(sorted(references.items()), len(references)))
    collect(tmp_path, shuffled, 30_000)
    collect(tmp_path / "fresh", shuffled, 30_000)
    assert files_of(tmp_path) == files_of(tmp_path / "fresh")
    assert pq.read_table(tmp_path / "out" / ".known.parquet").num_rows > 80
