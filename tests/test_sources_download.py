"""One raw file from mirrors: whole and right, or a plain reason and nothing left behind."""

import gzip
import hashlib
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from oracles_sources import Server, cut_short, in_turn, respond, serving

from sources.download import download
from sources.web import LONGEST_WAIT, retry_after
from stages.errors import UserError

BODY = gzip.compress(b"some reviews\n" * 5000, mtime=0)


def fetch(server: Server, file: Path, *paths: str, **options) -> dict:
    settings = {"attempts": 3, "pause": 0.01, "timeout": 5.0, **options}
    return download([server.url(path) for path in paths], file, **settings)


def test_the_file_arrives_byte_for_byte(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": respond(BODY)}
        file = tmp_path / "raw" / "reviews.json.gz"
        facts = fetch(server, file, "/a", sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY))
    assert file.read_bytes() == BODY
    assert facts == {"url": server.url("/a"), "bytes": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}


@pytest.mark.parametrize("first", [respond(b"", 429, Retry_After="0"), respond(b"", 503), cut_short(BODY)])
def test_a_server_in_trouble_is_asked_again(tmp_path: Path, first):
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
        (respond(b""), 3, "an empty answer"),
        (
            respond(b"<!DOCTYPE html><html>log in</html>", kind="text/html"),
            1,
            "no gzip file; it starts with b'<!DOCTYPE",
        ),
        (respond(BODY[:-20]), 3, "damaged gzip"),
    ],
)
def test_what_cannot_be_fetched_is_told_and_leaves_nothing(tmp_path: Path, answer, asked: int, complaint: str):
    with serving() as server:
        server.answers = {"/a": answer} if answer else {}
        with pytest.raises(UserError, match=rf"a\.gz could not be fetched:\n.*{complaint}"):
            fetch(server, tmp_path / "a.gz", "/a")
        assert server.asked == ["/a"] * asked
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_is_no_table(tmp_path: Path):
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
        with pytest.raises(UserError, match="bytes and not 5"):
            fetch(server, tmp_path / "b.gz", "/right", size=5)


def test_nobody_there(tmp_path: Path):
    with serving() as server:
        pass
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(server, tmp_path / "a.gz", "/a")


def test_an_older_file_survives_a_failed_download(tmp_path: Path):
    (tmp_path / "a.gz").write_bytes(b"older")
    with serving() as server, pytest.raises(UserError):
        fetch(server, tmp_path / "a.gz", "/a")
    assert (tmp_path / "a.gz").read_bytes() == b"older"


def test_other_schemes_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="only http and https"):
        download(["file:///etc/passwd"], tmp_path / "a")


def test_offline_opens_no_socket_and_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CM3_OFFLINE", "1")
    with serving() as server:
        with pytest.raises(UserError, match=r"CM3_OFFLINE is set.*put the file http://127\S+/a at .*a\.gz"):
            fetch(server, tmp_path / "a.gz", "/a")
        assert server.asked == []
