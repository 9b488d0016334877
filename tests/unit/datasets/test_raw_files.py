"""Provenance of raw files: a record is of the file that was downloaded, and of no other."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cm3.common.errors import UserError
from cm3.datasets import raw_files
from cm3.datasets.raw_files import provenance, record_of, stamp

URL = "https://host/a.csv"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def downloaded(folder: Path, content: bytes = b"published", **record: Any) -> Path:
    path = folder / "a.csv"
    path.write_bytes(content)
    facts = {"bytes": len(content), "sha256": digest(content), "url": URL, **stamp(path), "versions": {"python": "3"}}
    record_of(path).write_text(json.dumps({**facts, **record}))
    return path


def facts(path: Path, **expected: Any) -> dict[str, Any]:
    return provenance({"a": path}, {"a": expected})["a"]


def test_an_unchanged_download_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = downloaded(tmp_path)
    monkeypatch.setattr(raw_files, "sha256_of", lambda path: pytest.fail("read"))
    assert facts(path) == {"file": str(path), "bytes": 9, "sha256": digest(b"published"), "url": URL}
    assert facts(path, sha256=digest(b"published"), size=9)["url"] == URL


def test_a_replaced_file_of_equal_size_has_its_own_sha256_and_no_url(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = downloaded(tmp_path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = tmp_path / "other"
    other.write_bytes(b"by myself")
    os.utime(other, ns=times)
    other.replace(path)
    assert facts(path) == {"file": str(path), "bytes": 9, "sha256": digest(b"by myself"), "url": None}
    assert "a.csv has changed since it was downloaded" in caplog.text


@pytest.mark.parametrize("change", ["touch", "copy"])
def test_a_touched_or_copied_file_is_still_the_downloaded_one(tmp_path: Path, change: str):
    path = downloaded(tmp_path)
    if change == "touch":
        os.utime(path, ns=(1, 1))
    else:
        (tmp_path / "copy").write_bytes(path.read_bytes())
        (tmp_path / "copy").replace(path)
    assert facts(path)["url"] == URL


def test_a_record_of_an_earlier_release_is_compared_by_content(tmp_path: Path):
    path = downloaded(tmp_path)
    record = json.loads(record_of(path).read_text())
    record_of(path).write_text(json.dumps({name: record[name] for name in ("bytes", "sha256", "url")}))
    assert facts(path)["url"] == URL
    path.write_bytes(b"by myself")
    assert facts(path)["url"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01", '{"bytes": null}', "{}"])
def test_a_damaged_record_gives_no_origin(tmp_path: Path, text: str):
    path = downloaded(tmp_path)
    record_of(path).write_text(text)
    assert facts(path) == {"file": str(path), "bytes": 9, "sha256": digest(b"published"), "url": None}


def test_a_recorded_url_with_secrets_is_given_without_them(tmp_path: Path):
    assert facts(downloaded(tmp_path, url="https://me:pw@host/a.csv?sig=x"))["url"] == URL


def test_sizes_and_checksums_are_checked_wherever_a_file_is_from(tmp_path: Path):
    path = downloaded(tmp_path)
    with pytest.raises(UserError, match=rf"a\.csv: its sha256 is {digest(b'published')} and not {'0' * 64}; put"):
        facts(path, sha256="0" * 64)
    with pytest.raises(UserError, match=r"a\.csv: has 9 bytes and not 8; .*delete it to download it again, or correct"):
        facts(path, size=8)
    record_of(path).unlink()
    with pytest.raises(UserError, match="its sha256 is"):
        facts(path, sha256="0" * 64)
