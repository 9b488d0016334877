"""A file is whole or absent, whatever happens while it is written."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cm3.common.errors import UserError
from cm3.common.features import write_features
from cm3.common.files import atomic, exclusive, read_json, remove_stale_parts, write_json
from cm3.common.tables import USERS, write_table


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_what_stood_there(tmp_path: Path):
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_missing_folders_are_made_and_permissions_follow_the_umask(tmp_path: Path):
    target = tmp_path / "deep" / "er" / "a.json"
    before = os.umask(0o027)
    try:
        write_json(target, [1])
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


def test_nan_is_refused_in_json(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == []


def write_parquet(path: Path) -> None:
    users = pa.table({"user": pa.array(range(200_000), pa.int32()), "user_id": [os.urandom(8).hex()] * 200_000})
    users = users.set_column(1, "user_id", pa.array([os.urandom(8).hex() for _ in range(200_000)]))
    write_table(path, users, USERS)


def write_vectors(path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 256))
    write_features(path, [str(i) for i in range(2000)], vectors, ["ok"] * 2000, {})


@pytest.mark.parametrize(
    "write", [lambda p: write_json(p, "x" * 2_000_000), write_parquet, write_vectors], ids=["json", "table", "features"]
)
def test_a_full_disk_is_a_clean_message_and_no_half_file(tmp_path: Path, write):
    target = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=r"out: file too large\. Nothing half-written was kept; make room"):
            write(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_killed_writer_leaves_no_target_and_its_part_is_swept(tmp_path: Path):
    target = tmp_path / "out"
    code = f"from cm3.common.files import atomic\nwith atomic({str(target)!r}) as t:\n t.write_text('x')\n print(1, flush=True)\n input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    assert not target.exists()
    assert len(names(tmp_path)) == 1
    remove_stale_parts(target)
    assert names(tmp_path) == []


def test_a_lock_is_waited_for_and_freed_by_a_kill(tmp_path: Path):
    lock = tmp_path / "lock"
    code = (
        f"from cm3.common.files import exclusive\nwith exclusive({str(lock)!r}):\n print(1, flush=True)\n"
        " import time; time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    waiter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from cm3.common.files import exclusive\nwith exclusive({str(lock)!r}): print(2, flush=True)",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(0.5)
    assert waiter.poll() is None
    process.kill()
    output, _ = waiter.communicate(timeout=300)
    assert output == b"2\n"
    process.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    monkeypatch.setattr("fcntl.flock", raising(number))
    with exclusive(tmp_path / "a.lock"):
        pass
    assert f"{tmp_path}: files cannot be locked here" in caplog.text and "start one run at a time" in caplog.text


def test_another_fault_of_a_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fcntl.flock", raising(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), exclusive(tmp_path / "a.lock"):
        pass


def raising(number: int):
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock
