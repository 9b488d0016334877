"""Addresses of downloads: redirects, private addresses, names that do not exist, and secrets in URLs."""

import logging
import socket
from pathlib import Path

import pytest
from faulty_server import Answer, Mirror, moved
from fetching import BODY, NOISE, fetch, hidden
from oracles_sources import cut_short, in_turn, respond, serving

from cm3.common.errors import UserError
from cm3.common.ssrf import RefusedError
from cm3.datasets.download.client import AddressCheck
from cm3.datasets.download.stage import download


def test_redirects_within_a_host_are_followed_and_resumed(tmp_path: Path):
    mirror = Mirror(NOISE)
    answers = {"/a": moved("/b?x=1"), "/b?x=1": moved("c"), "/c": in_turn(mirror.cut(5000), mirror)}
    with serving() as server:
        server.answers = answers
        facts = fetch(server, tmp_path / "a.bin", "/a")
        assert facts["url"] == server.url("/a")
    assert mirror.ranges == [None, "bytes=5000-"] and (tmp_path / "a.bin").read_bytes() == NOISE


def test_a_redirect_loop_ends(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": moved("/b"), "/b": moved("/a")}
        with pytest.raises(UserError, match="more than 10 redirects"):
            fetch(server, tmp_path / "a.bin", "/a")
        assert len(server.asked) == 11


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("file:///etc/passwd", "not http or https"),
        ("ftp://127.0.0.1/a", "not http or https"),
        ("http://127.0.0.2/a", "a private address"),
        ("http://10.0.0.1/a", "a private address"),
        ("http://[::1]/a", "a private address"),
        ("http://[::ffff:127.0.0.1]/a", "a private address"),
        ("http://2130706433/a", "an address in an unusual form"),
        ("http://localhost:1/a", "a private address"),
        ("http://[/a", "redirects to"),
        ("http://:0/", "redirects to"),
    ],
)
def test_redirects_to_private_addresses_are_refused(tmp_path: Path, location: str, complaint: str):
    with serving() as server:
        server.answers = {"/a": moved(location)}
        with pytest.raises(UserError, match=rf"/a: .*{complaint}"):
            fetch(server, tmp_path / "a.bin", "/a")
        assert server.asked == ["/a"]


def test_private_addresses_are_for_the_mirror_only():
    known = {"mirror.lab": "10.0.0.7", "mirror.org": "8.8.8.8", "elsewhere.org": "127.0.0.1"}

    def resolve(host: str, port: int, type: int) -> list[tuple]:
        return [(socket.AF_INET, type, 0, "", (known[host], port))]

    lab, org = AddressCheck("mirror.lab", resolve), AddressCheck("Mirror.org", resolve)
    assert lab.addresses("mirror.lab", 80) == ["10.0.0.7"] == lab.addresses("mirror.lab", 80)
    with pytest.raises(RefusedError, match=r"elsewhere\.org has a private address"):
        lab.addresses("elsewhere.org", 80)
    assert org.addresses("mirror.org", 80) == ["8.8.8.8"]
    known["mirror.org"] = "10.0.0.9"
    with pytest.raises(RefusedError, match=r"mirror\.org has a private address"):
        org.addresses("mirror.org", 80)


def test_a_name_that_does_not_exist_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    codes = {"gone.example": socket.EAI_NONAME, "busy.example": socket.EAI_AGAIN}
    asked = []

    def resolve(host: str, *arguments, **options) -> list[tuple]:
        asked.append(host)
        raise socket.gaierror(codes[host], "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(AddressCheck.__init__, "__defaults__", (resolve,))
    urls = [f"http://{host}/a" for host in codes]
    with pytest.raises(
        UserError, match=r"the host name gone\.example cannot be resolved \(no answer\); check its spelling"
    ):
        download(urls, tmp_path / "a.gz", attempts=3, pause=0.01)
    assert asked == ["gone.example", *["busy.example"] * 3]


@pytest.mark.parametrize("fault", [respond(b"", 404), respond(b"", 503), respond(b"short"), cut_short(BODY), None])
def test_secrets_of_a_mirror_are_in_no_message_or_file(
    tmp_path: Path, fault: Answer | None, caplog: pytest.LogCaptureFixture
):
    secret = "/tree/a.gz?sig=t0ken&x=pa55"
    message = ""
    with serving() as server, caplog.at_level(logging.DEBUG, "cm3"):
        server.answers = {secret: fault or respond(BODY)}
        url = server.url(secret).replace("//", "//me:pa55word@")
        try:
            facts = download([url], tmp_path / "a.gz", attempts=2, pause=0.01, timeout=60.0)
            assert facts["url"] == server.url("/tree/a.gz")
        except UserError as error:
            message = str(error)
            assert server.url("/tree/a.gz") in message
        assert server.asked[0] == secret
    shown = message + caplog.text + "".join(path.read_text("latin-1") for path in tmp_path.rglob("*.json"))
    assert "t0ken" not in shown and "pa55" not in shown


@pytest.mark.parametrize("proxy", ["http://me:pa55word@127.0.0.1:9", "ftp://me:pa55word@host", "me:pa55/word@host"])
def test_the_password_of_a_proxy_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, proxy: str
):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError) as error:
        download(["http://mirror.example/a"], tmp_path / "a.gz", attempts=2, pause=0.01)
    assert "pa55" not in str(error.value) + caplog.text


@pytest.mark.parametrize(
    "url", ["http://me:pa55/word@127.0.0.1/a", "http://me:pa55[@127.0.0.1:x/a", "ftp://me:pa55@h/a"]
)
def test_the_password_of_an_invalid_mirror_is_in_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str):
    with pytest.raises(UserError) as error:
        download([url], tmp_path / "a.gz", attempts=2, pause=0.01)
    assert "pa55" not in str(error.value) + caplog.text


def test_secrets_of_a_redirect_are_in_no_message(tmp_path: Path):
    with serving() as server:
        server.answers = {"/a": moved("http://10.0.0.1/b?sig=t0ken"), "/c": moved("/c?sig=t0ken")}
        server.answers["/c?sig=t0ken"] = moved("/c?sig=t0ken")
        with pytest.raises(UserError) as error:
            fetch(server, tmp_path / "a.gz", "/a", "/c")
    assert "t0ken" not in str(error.value) and "http://10.0.0.1/b" in str(error.value)


def test_a_part_is_resumed_with_another_token(tmp_path: Path):
    mirror = Mirror(NOISE)
    with serving() as server:
        server.answers = {"/a?sig=old": in_turn(mirror.cut(50_000), respond(b"", 503)), "/a?sig=new": mirror}
        with pytest.raises(UserError):
            fetch(server, tmp_path / "a.bin", "/a?sig=old", attempts=1)
        assert "old" not in hidden(tmp_path)[1].read_text()
        facts = fetch(server, tmp_path / "a.bin", "/a?sig=new")
    assert facts["bytes"] == len(NOISE) and mirror.ranges[-1] == "bytes=50000-"


def test_a_file_of_passwords_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "netrc").write_text("machine\nx y z password")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"/netrc: cannot be read \(.*\); correct the file"):
        download(["http://127.0.0.1:9/a"], tmp_path / "a.gz", attempts=1)
