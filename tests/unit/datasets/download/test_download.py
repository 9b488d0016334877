"""Download of one raw file from mirrors: complete and correct, or a reason and nothing left behind."""

import base64
import gzip
import hashlib
import json
import logging
import random
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
from faulty_server import Answer, Mirror, dripped_framing, dripped_headers, moved, nobody, raw
from fetching import BODY, LATELY, NOISE, fail_noise, fetch, fetch_noise, hidden
from oracles_sources import cut_short, in_turn, respond, serving
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.http import LONGEST_WAIT, back_off, retry_after
from cm3.common.progress import Progress
from cm3.datasets.download import gzip as gzipped
from cm3.datasets.download.gzip import DamagedGzipError, GzipBombError, check_gzip
from cm3.datasets.download.partial import Partial
from cm3.datasets.download.response import content_range, validator_of
from cm3.datasets.download.stage import download, keep


def test_the_file_arrives_byte_for_byte(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": respond(BODY)}
        file = tmp_path / "raw" / "reviews.json.gz"
        facts = fetch(server, file, "/a", sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY))
    assert file.read_bytes() == BODY
    assert facts == {"url": server.url("/a"), "bytes": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}


@pytest.mark.parametrize("first", [respond(b"", 429, Retry_After="0"), respond(b"", 503), cut_short(BODY)])
def test_a_faulty_server_is_retried(tmp_path: Path, first):
    with serving() as server:
        server.answers = {"/a": in_turn(first, first, respond(BODY))}
        fetch(server, tmp_path / "a.gz", "/a")
        assert server.asked == ["/a"] * 3
    assert (tmp_path / "a.gz").read_bytes() == BODY


def test_retry_after_is_waited_for(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": in_turn(respond(b"", 429, Retry_After="1"), respond(BODY))}
        before = time.monotonic()
        fetch(server, tmp_path / "a.gz", "/a")
    assert time.monotonic() - before >= 1


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("7") == 7
    assert retry_after("") == retry_after("soon") == 0
    assert 50 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    assert retry_after("86400") == LONGEST_WAIT


@pytest.mark.parametrize(
    ("answer", "asked", "complaint"),
    [
        (None, 1, "HTTP 404"),
        (respond(b"", 403), 1, "HTTP 403"),
        (respond(b"", 500), 3, "HTTP 500"),
        (cut_short(BODY), 3, "the connection was cut"),
        (respond(b""), 3, "an empty response"),
        (
            respond(b"<!DOCTYPE html><html>log in</html>", kind="text/html"),
            1,
            "not a gzip file; it starts with b'<!DOCTYPE",
        ),
        (respond(BODY[:-20]), 2, "damaged gzip"),
        (respond(BODY[:-6] + b"wrong!"), 2, "damaged gzip"),
        (respond(BODY + b"and more"), 2, "damaged gzip"),
    ],
)
def test_a_failed_download_is_explained_and_leaves_nothing(tmp_path: Path, answer, asked: int, complaint: str):
    with serving() as server:
        server.answers = {"/a": answer} if answer else {}
        with pytest.raises(UserError, match=rf"a\.gz could not be downloaded:\n.*{complaint}"):
            fetch(server, tmp_path / "a.gz", "/a")
        assert server.asked == ["/a"] * asked
    assert list(tmp_path.iterdir()) == []


def test_an_html_page_is_not_a_table(tmp_path: Path):
    with serving() as server:
        server.answers = {
            "/a": respond(b"  <html><body>busy</body></html>"),
            "/b": respond(b"busy", kind="text/html; charset=utf-8"),
        }
        with pytest.raises(UserError, match="a web page, not the file"):
            fetch(server, tmp_path / "ratings.csv", "/a", "/b")
    assert not (tmp_path / "ratings.csv").exists()


def test_mirrors_are_tried_in_turn(tmp_path: Path):
    with serving() as server:
        server.answers = {"/wrong": respond(gzip.compress(b"other")), "/right": respond(BODY)}
        sha256 = hashlib.sha256(BODY).hexdigest()
        facts = fetch(server, tmp_path / "a.gz", "/gone", "/wrong", "/right", sha256=sha256)
        assert server.asked == ["/gone", "/wrong", "/right"] and facts["url"] == server.url("/right")
        with pytest.raises(UserError, match=r"HTTP 404(.|\n)*sha256 is"):
            fetch(server, tmp_path / "b.gz", "/gone", "/wrong", sha256=sha256)
        with pytest.raises(UserError, match="bytes, not 5"):
            fetch(server, tmp_path / "b.gz", "/right", size=5)


def test_a_refused_connection_is_explained(tmp_path: Path):
    with nobody() as url, pytest.raises(UserError, match=r"a\.gz could not be downloaded:\n  http.*[Cc]onnect"):
        download([url], tmp_path / "a.gz", attempts=2, pause=0.01)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failed_download(tmp_path: Path):
    (tmp_path / "a.gz").write_bytes(b"older")
    with serving() as server, pytest.raises(UserError):
        fetch(server, tmp_path / "a.gz", "/a")
    assert (tmp_path / "a.gz").read_bytes() == b"older"


def test_other_schemes_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="only http and https"):
        download(["file:///etc/passwd"], tmp_path / "a")


def test_offline_names_the_file_to_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CM3_OFFLINE", "1")
    with serving() as server:
        with pytest.raises(UserError, match=r"CM3_OFFLINE is set.*put the file http://127\S+/a at .*a\.gz"):
            fetch(server, tmp_path / "a.gz", "/a")
        assert server.asked == []


def test_proxies_of_the_environment_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving() as server:
        server.answers = {"http://mirror.example/a": respond(BODY)}
        monkeypatch.setenv("http_proxy", server.url(""))
        monkeypatch.setenv("no_proxy", "")
        facts = download(["http://mirror.example/a"], tmp_path / "a.gz", attempts=1)
    assert facts["bytes"] == len(BODY)


def test_passwords_are_sent_to_their_host_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard = []

    def listen(handler) -> None:
        heard.append((handler.path, handler.headers["Authorization"]))
        (respond(BODY) if handler.path == "/b" else moved("/b"))(handler)

    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    with serving() as server:
        server.answers = {"/a": listen, "/b": listen}
        download([server.url("/a").replace("127", "u:p@127")], tmp_path / "a.gz", attempts=1)
        monkeypatch.setenv("NETRC", str(netrc))
        download([server.url("/a").replace("127.0.0.1", "localhost")], tmp_path / "b.gz", attempts=1)
        download([server.url("/a")], tmp_path / "c.gz", attempts=1)
    mine = f"Basic {base64.b64encode(b'me:secret').decode()}"
    theirs = f"Basic {base64.b64encode(b'u:p').decode()}"
    assert heard == [("/a", theirs), ("/b", None), ("/a", None), ("/b", None), ("/a", mine), ("/b", mine)]


# Stalled responses


def test_a_stalled_server_is_given_up(tmp_path: Path):
    faults = {
        "/stalled": (Mirror(NOISE).stall(5000), "no answer in time"),
        "/silent": (Mirror(NOISE).stall(0), "no answer in time"),
        "/dripping": (Mirror(NOISE).drip(5000), "too slow: "),
        "/headers": (dripped_headers(), "no answer in time"),
        "/framing": (dripped_framing(), "no answer in time"),
        "/disconnected": (raw(b""), "[Dd]isconnect"),
        "/other": (raw(b"no HTTP at all\r\n\r\n"), "no proper HTTP answer"),
    }

    def complaint(path: str) -> str:
        with pytest.raises(UserError) as error:
            fetch(server, tmp_path / path[1:], path, timeout=2.0, attempts=2, slowest=1_000_000)
        return str(error.value)

    began = time.monotonic()
    with serving() as server, ThreadPoolExecutor(len(faults)) as threads:
        server.answers = {path: answer for path, (answer, _) in faults.items()}
        complaints = dict(zip(faults, threads.map(complaint, faults), strict=True))
        assert time.monotonic() - began < 60, "each lasts 120 s"
    for path, (_, expected) in faults.items():
        assert re.search(rf"{path}: .*{expected}", complaints[path]), complaints[path]


def test_a_stalled_download_is_resumed(tmp_path: Path):
    mirror = Mirror(NOISE)
    fetch_noise(tmp_path, {"/a": in_turn(mirror.stall(50_000), mirror.drip(10_000), mirror)}, timeout=2.0)
    assert mirror.ranges[:2] == [None, "bytes=50000-"] and len(mirror.ranges) == 3


def test_back_off_doubles_with_jitter():
    waits = [[back_off(n, 1.0, None) for _ in range(20)] for n in range(1, 9)]
    assert all(min(2.0 ** (n - 1), 60) <= w <= min(2.0 ** (n - 1) + 1, 60) for n, ws in enumerate(waits, 1) for w in ws)
    assert len(set(waits[0])) > 1 and back_off(10_000, 1.0, TimeoutError()) == 60


# Responses that are not the file


def test_a_wrong_length_is_final(tmp_path: Path):
    for size in (len(NOISE) - 1, len(NOISE) + 1):
        mirror = Mirror(NOISE)
        assert f"has 100000 bytes, not {size}" in fail_noise(tmp_path, {"/a": mirror}, size=size)
        assert len(mirror.ranges) == 1 and list(tmp_path.iterdir()) == []


def test_a_body_without_length_is_compared_with_the_size(tmp_path: Path):
    mirror = Mirror(NOISE, says_length=False)
    assert "has more than 5 bytes" in fail_noise(tmp_path, {"/a": mirror}, size=5)
    fetch_noise(tmp_path, {"/a": in_turn(mirror.cut(5000), mirror)}, size=len(NOISE))
    assert mirror.ranges == [None, None, "bytes=5000-"]


def test_more_than_the_promised_length_is_refused(tmp_path: Path):
    longer = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\na,b\n1 and more")
    assert "no proper HTTP answer" in fail_noise(tmp_path, {"/a": longer}) and list(tmp_path.iterdir()) == []


def test_the_rate_excludes_resumed_bytes(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO), Progress(1_100_000, "MB", start=500_000) as progress:
        progress.started -= 1000
        progress.advance(500_000)
    rate, left = re.search(r"1000000 of 1100000 MB, (.*) MB/s, (.*) s left", caplog.text).groups()
    assert 400 < float(rate) <= 500 and 200 <= int(left) < 250


def test_a_truncated_gzip_leads_to_the_next_mirror(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": respond(BODY[:-20]), "/b": respond(BODY)}
        facts = fetch(server, tmp_path / "a.gz", "/a", "/b")
        assert server.asked == ["/a", "/a", "/b"] and facts["url"] == server.url("/b")
        server.answers["/a"] = in_turn(respond(BODY[:-20]), respond(BODY))
        assert fetch(server, tmp_path / "b.gz", "/a", "/b")["url"] == server.url("/a")


def test_a_gzip_that_ends_early_without_length_was_cut(tmp_path: Path):
    mirror = Mirror(gzip.compress(NOISE), says_length=False)
    with serving() as server:
        server.answers = {"/a": in_turn(mirror.cut(5000), mirror)}
        fetch(server, tmp_path / "a.gz", "/a")
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == NOISE and mirror.ranges == [None, "bytes=5000-"]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bomb = gzip.compress(bytes(3_000_000))
    (tmp_path / "a.gz").write_bytes(bomb)
    assert check_gzip(tmp_path / "a.gz") == 3_000_000
    monkeypatch.setattr(gzipped, "UNPACKED_FREE", 1_000_000)
    with pytest.raises(GzipBombError):
        check_gzip(tmp_path / "a.gz")
    told = fail_noise(tmp_path, {"/a": respond(bomb)}, name="b.gz")
    assert "a gzip bomb" in told and [path.name for path in tmp_path.iterdir()] == ["a.gz"]


def test_a_gzip_file_is_read_to_its_end(tmp_path: Path):
    path = tmp_path / "a.gz"
    for whole in (BODY, BODY * 2, BODY + gzip.compress(b"")):
        path.write_bytes(whole)
        check_gzip(path)
    for damaged in (b"", BODY[:5], BODY[:-1], BODY + b"\x1f", BODY + BODY[:-1], BODY + b"garbage" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DamagedGzipError):
            check_gzip(path)


@pytest.mark.parametrize(
    ("name", "answer", "complaint"),
    [
        ("a.csv", respond(b"\xef\xbb\xbf <!doctype HTML>"), "a web page"),
        ("a.csv", respond(b'<?xml version="1.0"?><Error>AccessDenied</Error>'), "a web page"),
        ("a.csv", respond(b'{"error": "slow down"}', kind="application/json"), "a JSON message"),
        ("a.csv", respond(b"a,b", Content_Encoding="br"), r"compressed \(br\)"),
        ("a.parquet", respond(b"<html>"), "not a parquet file"),
    ],
)
def test_a_response_of_another_format_is_final(tmp_path: Path, name: str, answer: Answer, complaint: str):
    with serving() as server:
        server.answers = {"/a": answer}
        with pytest.raises(UserError, match=rf"/a: {complaint}"):
            fetch(server, tmp_path / name, "/a")
        assert server.asked == ["/a"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_the_part_kept(tmp_path: Path):
    mirror, body = Mirror(random.Random(2).randbytes(500_000)), random.Random(2).randbytes(500_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving() as server:
        server.answers = {"/a": mirror}
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(UserError, match=r"a\.bin: file too large\. 0\.. MB of 0\.5 MB are kept .*make room"):
                fetch(server, tmp_path / "a.bin", "/a")
            assert sorted(tmp_path.iterdir()) == hidden(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        fetch(server, tmp_path / "a.bin", "/a")
    assert mirror.ranges == [None, "bytes=200000-"] and (tmp_path / "a.bin").read_bytes() == body


# Files that are there already


def test_a_whole_file_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "a.gz"
    assert keep(file) is None
    file.write_bytes(BODY)
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert keep(file, sha256, len(BODY)) == {"bytes": len(BODY), "sha256": sha256, "url": None}
    with pytest.raises(UserError, match=f"its sha256 is {sha256} and not {'0' * 64}"):
        keep(file, "0" * 64)
    file.write_bytes(BODY[:-9])
    assert keep(file) is None and "it is downloaded again" in caplog.text
    assert file.read_bytes() == BODY[:-9]
    file.write_bytes(BODY)
    (tmp_path / "a.gz.stage.json").write_text(json.dumps({"sha256": "1" * 64}))
    assert keep(file) is None and "is not the file that was downloaded; it is downloaded again" in caplog.text
    assert keep(file, sha256) is not None and keep(file, "0" * 64) is None
    (tmp_path / "folder.gz").mkdir()
    with pytest.raises(UserError, match=r"folder\.gz: is a folder in the place of a downloaded file"):
        keep(tmp_path / "folder.gz")


@pytest.mark.parametrize("place", ["/dev/null", "/proc/version", "LINK"])
def test_a_place_that_cannot_be_written_is_named_in_one_line(tmp_path: Path, place: str):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    place = place.replace("LINK", f"{tmp_path}/link")
    spec = json.dumps({"urls": ["http://127.0.0.1:9/a"]})
    command = [sys.executable, "-m", "cm3.datasets.download.stage", "--spec", spec, "--output", f"file={place}/a.gz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{place}: " in done.stderr.strip().splitlines()[-1]


# Headers


def test_headers_are_parsed_as_in_rfc_9110():
    assert content_range({"Content-Range": "bytes 7-9/10"}) == (7, 10)
    assert content_range({"Content-Range": "bytes 7-9/*"}) == (7, None)
    assert content_range({"Content-Range": "bytes */10"}) == (None, 10)
    assert content_range({}) == content_range({"Content-Range": "items 7-9/10"}) == (None, None)
    now, before = formatdate(time.time(), usegmt=True), LATELY
    assert validator_of({"ETag": '"a"', "Last-Modified": before, "Date": now}) == '"a"'
    assert validator_of({"ETag": 'W/"a"', "Last-Modified": before, "Date": now}) == before
    for weak in ({}, {"Last-Modified": before}, {"Last-Modified": now, "Date": now}, {"ETag": "a"}):
        assert validator_of(weak) is None


def test_a_part_without_validator_is_not_kept(tmp_path: Path):
    for validator, checked, kept in [(None, False, False), (None, True, True), ('"v1"', False, True)]:
        with Partial(tmp_path / "a", checked) as partial:
            partial.restart("http://host/a", validator, None)
            partial.append(b"123")
        with Partial(tmp_path / "a", checked) as partial:
            assert (partial.length, partial.resumed) == ((3, True) if kept else (0, False))
            assert partial.digest.hexdigest() == hashlib.sha256(b"123" if kept else b"").hexdigest()
            partial.discard()
        assert list(tmp_path.iterdir()) == []
