"""Faults of the machine stop the stage or the extraction; they are not written down as faults of an image."""

import errno
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles_sources import image, items_file, respond, serving
from PIL import ImageFile

from cm3.common.errors import UserError
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images
from extractors.image.descriptor import DescriptorExtractor, DescriptorSpec

RUNTIME = {"attempts": 2, "pause": 0.01, "rate": 10_000.0, "timeout": 60.0, "threads": 2}
FAULTS = [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "Cannot allocate memory")]
STOPS = "failed for a reason of this machine, not of the data"


def collect(folder: Path, references: dict[str, Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    items = items_file(folder / "items.parquet", references)
    collect_images(spec, RUNTIME, items, {}, folder / "out" / "manifest.parquet")
    return read_table(folder / "out" / "manifest.parquet", MANIFEST).to_pylist()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    for name in "abc":
        (tmp_path / "shop" / f"{name}.jpg").write_bytes(image())
    return tmp_path / "shop"


def local(shop: Path) -> dict[str, Any]:
    return Images(folder=str(shop), pattern="{item_id}.jpg").spec()


@pytest.mark.parametrize("fault", FAULTS)
def test_while_an_image_of_a_folder_is_decoded(
    tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(UserError, match=STOPS):
            collect(tmp_path, {name: [] for name in "abc"}, local(shop))
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    assert {row["status"] for row in collect(tmp_path, {name: [] for name in "abc"}, local(shop))} == {"ok"}


def break_images(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    """Let every image file fail when it is opened."""
    open_file = Path.open

    def fail(path: Path, *options: Any) -> Any:
        if path.suffix == ".jpg":
            raise fault
        return open_file(path, *options)

    monkeypatch.setattr(Path, "open", fail)


@pytest.mark.parametrize("fault", FAULTS)
def test_while_a_file_of_a_folder_is_read(
    tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    break_images(monkeypatch, fault)
    with pytest.raises(UserError, match=STOPS):
        collect(tmp_path, {"a": []}, local(shop))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), r"a\.jpg: cannot be read \(Input/output error\)"),
        (OSError(errno.ESTALE, "Stale file handle"), r"a\.jpg: cannot be read \(Stale file handle\)"),
        (PermissionError(errno.EACCES, "Permission denied"), r"a\.jpg: cannot be read .*check the permissions"),
    ],
)
def test_a_disk_or_a_permission_stops_the_stage(
    tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, reason: str
) -> None:
    break_images(monkeypatch, fault)
    with pytest.raises(UserError, match=reason):
        collect(tmp_path, {"a": []}, local(shop))


def test_odd_entries_of_a_folder_fail_for_their_items(tmp_path: Path, shop: Path) -> None:
    (shop / "dangling.jpg").symlink_to(shop / "nothing")
    (shop / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(shop / "pipe.jpg")
    (shop / os.fsdecode(b"caf\xe9.jpg")).write_bytes(image())
    rows = collect(tmp_path, {name: [] for name in ("a", "dangling", "loop", "pipe", "x" * 300)}, local(shop))
    assert [row["status"] for row in rows] == ["ok", "missing", "failed", "failed", "failed"]


@pytest.mark.parametrize("fault", FAULTS)
def test_while_a_download_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    with serving() as server:
        server.answers = {f"/{n}": respond(image()) for n in range(5)}
        references = {str(n): [server.url(f"/{n}")] for n in range(5)}
        spec = Images(hosts=["127.0.0.1"], private=True).spec()
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", fail)
            with pytest.raises(UserError, match=STOPS):
                collect(tmp_path, references, spec)
        assert {row["status"] for row in collect(tmp_path, references, spec)} == {"ok"}


def test_too_many_open_files_while_connecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        server.answers = {"/a": respond(image())}
        address = server.url("/a").replace("127.0.0.1", "localhost")

        async def exhaust(*_: Any, **__: Any) -> None:
            # All file descriptors are taken, and a resolver says no more than that the name is unknown.
            held = []
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 400), hard))
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                taken.extend(held)
            limits.append((soft, hard))
            raise OSError(-3, "Temporary failure in name resolution")

        taken: list[int] = []
        limits: list[tuple[int, int]] = []
        monkeypatch.setattr("aiohttp.DefaultResolver.resolve", exhaust)
        spec = Images(hosts=["localhost"], private=True).spec()
        try:
            with pytest.raises((UserError, OSError), match=r"Too many open files"):
                collect(tmp_path, {"a": [address]}, spec)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_while_an_extractor_decodes(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    extractor = DescriptorExtractor(DescriptorSpec(modality="image", backend="descriptor"))
    assert np.isfinite(extractor.run([image()]).embedding).all()
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=STOPS):
        extractor.run([image()])


def test_a_killed_process_of_an_extractor_is_explained() -> None:
    def kill(*_: Any, **__: Any) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    extractor = DescriptorExtractor(DescriptorSpec(modality="image", backend="descriptor", workers=2))
    with pytest.raises(UserError, match="was killed, probably for lack of memory; set fewer `workers`"):
        extractor.run([image((9, 9))] * 2000, kill)
