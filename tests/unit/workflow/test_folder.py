"""Digests of image folders: content decides, odd entries neither stop nor hang planning, own outputs are left out."""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from cm3.common.errors import UserError
from workflow.plan import folder as folder_digests
from workflow.plan.folder import CACHE, digest_of_folder


@pytest.fixture(autouse=True)
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"first")
    (folder / "sub" / "b.png").write_bytes(b"second")
    return folder


def test_the_digest_is_that_of_earlier_releases(images: Path) -> None:
    lines = [
        f"a.png\0{hashlib.sha256(b'first').hexdigest()}\n",
        f"sub/b.png\0{hashlib.sha256(b'second').hexdigest()}\n",
    ]
    assert digest_of_folder(images) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_odd_entries_are_left_out(images: Path) -> None:
    before = digest_of_folder(images)
    (images / "dangling.png").symlink_to("/nowhere/x.png")
    (images / ".#a.png").symlink_to("user@host.123:1")
    (images / "loop.png").symlink_to("loop.png")
    (images / "null.png").symlink_to("/dev/zero")
    os.mkfifo(images / "pipe.png")
    (images / "to-pipe.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(images)
        server.bind("socket.png")
        os.chdir(images.parent / "project")
        assert digest_of_folder(images) == before
    (images / "dangling.png").unlink()
    (images / "dangling.png").symlink_to("a.png")
    assert digest_of_folder(images) != before


def test_names_that_are_not_utf_8_count(images: Path) -> None:
    before = digest_of_folder(images)
    odd = images / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes(b"x")
    named = digest_of_folder(images)
    assert named != before and digest_of_folder(images) == named
    odd.rename(images / os.fsdecode(b"caf\xe8.png"))
    assert digest_of_folder(images) not in (before, named)


def test_only_changed_files_are_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    sha256_of = folder_digests.sha256_of
    monkeypatch.setattr(folder_digests, "sha256_of", lambda path: (read.append(path), sha256_of(path))[1])
    before = digest_of_folder(images)
    assert digest_of_folder(images) == before and len(read) == 2
    # The same size and time, as `cp -p` and archives leave them, in another file.
    status = (images / "a.png").stat()
    (images / "new").write_bytes(b"other")
    os.utime(images / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (images / "new").replace(images / "a.png")
    assert digest_of_folder(images) != before and len(read) == 3


def test_an_unreadable_file_does_not_stop_planning(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of_folder(images)
    shutil.rmtree(CACHE)
    sha256_of = folder_digests.sha256_of

    def refuse(path: str) -> str:
        if path.endswith("a.png"):
            raise PermissionError(13, "Permission denied", path)
        return sha256_of(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_digests, "sha256_of", refuse)
        assert digest_of_folder(images) != before
    assert digest_of_folder(images) == before


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"7", b'{"x": 1}', b'{"x": []}', b"\xff\xfe", b'{"checksum": "x", "files": {}}']
)
def test_a_damaged_cache_is_made_anew(images: Path, damage: bytes) -> None:
    before = digest_of_folder(images)
    (cache,) = CACHE.iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(damage)
    assert digest_of_folder(images) == before and cache.read_bytes() == whole


def test_an_altered_digest_in_the_cache_is_noticed(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = digest_of_folder(images)
    (cache,) = CACHE.iterdir()
    text = cache.read_text()
    digest = hashlib.sha256(b"first").hexdigest()
    cache.write_text(text.replace(digest, digest[::-1]))
    assert digest_of_folder(images) == before
    assert cache.name in caplog.text and "damaged" in caplog.text


def test_a_cache_of_earlier_releases_is_used(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of_folder(images)
    (cache,) = CACHE.iterdir()
    files = json.loads(cache.read_text())["files"]
    cache.write_text(json.dumps({path: [entry[0], entry[1], entry[-1]] for path, entry in files.items()}))
    monkeypatch.setattr(folder_digests, "sha256_of", None)
    assert digest_of_folder(images) == before


def test_a_cache_that_cannot_be_written_does_not_stop_planning(images: Path) -> None:
    CACHE.parent.mkdir()
    CACHE.write_text("a file in place of the folder")
    assert digest_of_folder(images) == digest_of_folder(images)


@pytest.mark.parametrize("where", [".", ".."])
def test_own_outputs_in_the_folder_are_left_out(in_project: Path, where: str) -> None:
    (in_project / "data").mkdir()
    (in_project / "data" / "a.png").write_bytes(b"first")
    before = digest_of_folder(Path(where))
    for output in ("processed/shop/images", "results/x", "logs/shop", ".snakemake/metadata", ".git"):
        (in_project / output).mkdir(parents=True, exist_ok=True)
        (in_project / output / "made.png").write_bytes(b"made")
    (in_project / "run.log").write_text("a log")
    assert digest_of_folder(Path(where)) == before
    (in_project / "data" / "a.png").write_bytes(b"changed")
    assert digest_of_folder(Path(where)) != before


def test_outputs_that_are_links_are_left_out(in_project: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "made").mkdir(parents=True)
    before = digest_of_folder(tmp_path)
    (in_project / "processed").symlink_to(tmp_path / "disk" / "made")
    (tmp_path / "disk" / "made" / "x.png").write_bytes(b"x")
    assert digest_of_folder(tmp_path) == before


@pytest.mark.parametrize("where", ["processed", "results/x", ".snakemake"])
def test_a_folder_of_own_outputs_is_refused(in_project: Path, where: str) -> None:
    (in_project / where).mkdir(parents=True)
    with pytest.raises(UserError, match="which the pipeline writes; put the images into another folder"):
        digest_of_folder(Path(where))


def test_a_folder_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        digest_of_folder(Path("nowhere"))
