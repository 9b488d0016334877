"""Resuming a download that was cut, stalled or killed, never from parts of different files."""

import hashlib
import json
import logging
import random
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from faulty_server import Answer, Mirror
from fetching import LATELY, NOISE, fail_noise, fetch, fetch_noise, hidden
from oracles_sources import in_turn, respond, serving

from cm3.common.errors import UserError
from cm3.datasets.download import stage as download_module


@pytest.mark.parametrize("at", [1, 600, 4096, 70_000, 99_999])
@pytest.mark.parametrize("end", [Mirror.cut, Mirror.reset])
def test_a_cut_download_is_resumed(tmp_path: Path, at: int, end, caplog: pytest.LogCaptureFixture):
    mirror = Mirror(NOISE)
    with caplog.at_level(logging.INFO):
        fetch_noise(tmp_path, {"/a": in_turn(end(mirror, at), mirror)}, attempts=2)
    # The first bytes must tell that it is no web page; fewer are not worth keeping.
    assert mirror.ranges == [None, f"bytes={at}-" if at >= 512 else None]
    assert ("resuming at" in caplog.text) == (at >= 512)


def test_a_try_with_new_bytes_does_not_count(tmp_path: Path):
    mirror = Mirror(NOISE)
    fetch_noise(tmp_path, {"/a": mirror.cut(5000)}, attempts=2)
    assert mirror.ranges[1:] == [f"bytes={n}-" for n in range(5000, 100_000, 5000)] and mirror.sent == len(NOISE)


def test_small_gains_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download_module, "MOST_SMALL_GAINS", 10)
    mirror = Mirror(NOISE)
    fail_noise(tmp_path, {"/a": in_turn(mirror.cut(600), mirror.cut(1))})
    assert len(mirror.ranges) == 10


@pytest.mark.parametrize(
    "mirror",
    [
        Mirror(NOISE, honours_range=False),
        Mirror(NOISE, etag=None),
        Mirror(NOISE, etag='W/"v1"'),
        Mirror(NOISE, etag=None, modified=formatdate(time.time() + 86_400, usegmt=True)),
    ],
    ids=["range ignored", "no validator", "weak etag", "too fresh"],
)
def test_without_range_or_validator_it_starts_again(tmp_path: Path, mirror: Mirror):
    fetch_noise(tmp_path, {"/a": in_turn(mirror.cut(5000), mirror.cut(50_000), mirror)})
    assert mirror.ranges == ([None, "bytes=5000-", "bytes=50000-"] if not mirror.honours_range else [None] * 3)


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_last_modified_or_sha256_suffices_to_resume(tmp_path: Path, etag: str | None):
    dated, bare = Mirror(NOISE, etag=etag, modified=LATELY), Mirror(NOISE, etag=etag)
    fetch_noise(tmp_path, {"/a": in_turn(dated.cut(5000), dated)})
    (tmp_path / "a.bin").unlink()
    fetch_noise(tmp_path, {"/a": in_turn(bare.cut(5000), bare)}, sha256=hashlib.sha256(NOISE).hexdigest())
    assert dated.ranges == bare.ranges == [None, "bytes=5000-"]


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_a_changed_file_starts_again(tmp_path: Path, honours_if_range: bool):
    old, new = Mirror(NOISE), Mirror(NOISE[::-1], '"v2"', honours_if_range=honours_if_range)
    fetch_noise(tmp_path, {"/a": in_turn(old.cut(5000), new)}, body=NOISE[::-1])
    assert new.ranges == (["bytes=5000-"] if honours_if_range else ["bytes=5000-", None])


def test_a_wrong_part_is_found_by_sha256(tmp_path: Path):
    old, new = Mirror(NOISE[::-1], etag=None), Mirror(NOISE, etag=None)
    sha256 = hashlib.sha256(NOISE).hexdigest()
    fetch_noise(tmp_path, {"/a": in_turn(old.cut(5000), new)}, sha256=sha256)
    assert new.ranges == ["bytes=5000-", None]
    (tmp_path / "a.bin").unlink()
    told = fail_noise(tmp_path, {"/a": in_turn(old.cut(5000), old)}, sha256=sha256)
    assert "sha256 is" in told and list(tmp_path.iterdir()) == []


def test_another_range_than_requested_is_rejected(tmp_path: Path):
    mirror = Mirror(NOISE)
    fetch_noise(tmp_path, {"/a": in_turn(mirror.cut(5000), mirror.misplaced, mirror)})
    assert mirror.ranges == [None, "bytes=5000-", None]


def test_416_for_a_complete_file_is_success(tmp_path: Path):
    mirror = Mirror(NOISE, says_length=False)
    # Nobody said how long it is, and the reset came behind the last byte.
    fetch_noise(tmp_path, {"/a": in_turn(mirror.reset(len(NOISE)), mirror)})
    assert mirror.ranges == [None, f"bytes={len(NOISE)}-"]


def test_416_for_a_shorter_file_starts_again(tmp_path: Path):
    old, new = Mirror(NOISE), Mirror(NOISE[:3000], honours_if_range=False)
    fetch_noise(tmp_path, {"/a": in_turn(old.cut(5000), new)}, body=NOISE[:3000])
    assert new.ranges == ["bytes=5000-", None]


def test_the_mirror_of_a_part_is_tried_first(tmp_path: Path):
    one, two = Mirror(NOISE), Mirror(NOISE)
    answers = {"/a": in_turn(one.cut(5000), respond(b"", 503)), "/b": in_turn(two.cut(7000), respond(b"", 503), two)}
    with serving() as server:
        server.answers = answers
        with pytest.raises(UserError, match=r"(?s)/a: HTTP 503.*/b: HTTP 503.*0.0 MB of 0.1 MB are kept: run the same"):
            fetch(server, tmp_path / "a.bin", "/a", "/b", attempts=1)
        assert sorted(tmp_path.iterdir()) == hidden(tmp_path)
        fetch(server, tmp_path / "a.bin", "/a", "/b")
    assert two.ranges == [None, "bytes=7000-"] and one.ranges == [None]
    assert (tmp_path / "a.bin").read_bytes() == NOISE


def test_a_useless_part_is_deleted(tmp_path: Path):
    mirror = Mirror(NOISE)
    gone = {"/a": in_turn(mirror.cut(5000), respond(b"", 404))}
    assert "are kept" not in fail_noise(tmp_path, gone) and list(tmp_path.iterdir()) == []
    fail_noise(tmp_path, {"/a": in_turn(mirror.cut(5000), respond(b"", 503))})
    assert sorted(tmp_path.iterdir()) == hidden(tmp_path)
    assert "are kept" not in fail_noise(tmp_path, {"/b": respond(b"", 503)}, "/b") and list(tmp_path.iterdir()) == []


def test_an_html_page_does_not_delete_the_part(tmp_path: Path):
    mirror = Mirror(NOISE)
    page = respond(b"<html>pay for the hotel's network</html>", kind="text/html")
    with serving() as server:
        server.answers = {"/a": in_turn(mirror.cut(5000), page, mirror)}
        with pytest.raises(UserError, match=r"(?s)a web page.*are kept"):
            fetch(server, tmp_path / "a.bin", "/a")
        fetch(server, tmp_path / "a.bin", "/a")
    assert mirror.ranges == [None, "bytes=5000-"] and (tmp_path / "a.bin").read_bytes() == NOISE


@pytest.mark.parametrize("note", [b"", b"[]", b'{"url": 1, "validator": null, "total": null}', b"\xff"])
def test_a_damaged_note_means_a_fresh_start(tmp_path: Path, note: bytes):
    for path, content in zip(hidden(tmp_path), [b"x" * 5000, note], strict=True):
        path.write_bytes(content)
    mirror = Mirror(NOISE)
    fetch_noise(tmp_path, {"/a": mirror})
    assert mirror.ranges == [None]


def test_a_complete_part_needs_no_request(tmp_path: Path):
    with serving() as server:
        note = {"url": server.url("/a"), "validator": '"v1"', "total": len(NOISE)}
        for path, content in zip(hidden(tmp_path), [NOISE, json.dumps(note).encode()], strict=True):
            path.write_bytes(content)
        fetch(server, tmp_path / "a.bin", "/a")
        assert server.asked == [] and [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_killed_download_is_resumed(tmp_path: Path):
    body = random.Random(1).randbytes(2_000_000)
    mirror = Mirror(body)
    part = hidden(tmp_path)[0]
    with serving() as server:
        command = [
            sys.executable,
            "-m",
            "cm3.datasets.download.stage",
            "--spec",
            json.dumps({"urls": [server.url("/a")]}),
        ]
        command += ["--output", f"file={tmp_path / 'a.bin'}"]
        for share in (0.2, 0.5, 0.8):
            kept, enough = part.stat().st_size if part.exists() else 0, int(share * len(body))
            server.answers = {"/a": mirror.stall(enough + 100_000 - kept)}
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wait_until(lambda enough=enough: part.exists() and part.stat().st_size > enough)
            process.kill()
            process.wait()
        server.answers = {"/a": mirror}
        last = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    offsets = [0 if asked is None else int(asked[6:-1]) for asked in mirror.ranges]
    assert len(offsets) == 4 and offsets == sorted(offsets) and offsets[3] > 0.8 * len(body)
    # What was under way at a kill is sent again, and no more.
    assert len(body) <= mirror.sent < 1.5 * len(body)
    assert (tmp_path / "a.bin").read_bytes() == body and "resuming at 1." in last.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.bin.lock", "a.bin"]


def wait_until(true) -> None:
    ends = time.monotonic() + 300
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_two_downloads_of_one_file_wait_for_each_other(tmp_path: Path):
    mirror = Mirror(NOISE, pace=0.02)
    with serving() as server:
        server.answers = {"/a": mirror}
        threads = [threading.Thread(target=fetch, args=(server, tmp_path / "a.bin", "/a")) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert (tmp_path / "a.bin").read_bytes() == NOISE and [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert mirror.ranges == [None, None]


@pytest.mark.parametrize("seed", range(12))
def test_the_file_arrives_despite_random_faults(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    body = draw.randbytes(draw.randrange(1, 300_000))
    options = {"says_length": draw.random() < 0.8, "honours_if_range": draw.random() < 0.8}
    mirror = Mirror(body, draw.choice(['"v2"', 'W/"v2"', None]), draw.choice([LATELY, None]), **options)
    older = Mirror(draw.randbytes(draw.randrange(1, 300_000)), '"v1"')

    def fault() -> Answer:
        at = draw.randrange(len(body) + 1)
        some: list[Answer] = [mirror.reset(at), mirror.reset(at // 9), older.reset(draw.randrange(len(older.body)))]
        some += [respond(b"", 500), respond(b"", 429, Retry_After="0"), respond(b""), mirror.misplaced]
        # Without a length or a checksum a plain end is the end, as for every client.
        some += [mirror.cut(at), mirror.cut(at // 9)] if mirror.says_length else []
        return draw.choice(some)

    faults = [fault() for _ in range(draw.randrange(15))]
    known = {} if draw.random() < 0.5 else {"sha256": hashlib.sha256(body).hexdigest()}
    # A misplaced answer without Range is the file itself, so that it may end before the faults do.
    fetch_noise(tmp_path, {"/a": in_turn(*faults, mirror)}, body=body, attempts=20, pause=0.001, **known)
