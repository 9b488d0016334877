"""Image download: each server fault gives a row with a reason, and none stops or hangs the stage."""

import gzip
import hashlib
import resource
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import cut_short, image, in_turn, items_file, respond, serving

from cm3.common.errors import UserError
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images import fetch
from cm3.datasets.images.config import Images
from cm3.datasets.images.fetch import without_request
from cm3.datasets.images.stage import collect_images

FAST = {"attempts": 3, "pause": 0.01, "rate": 10_000.0, "timeout": 60.0, "threads": 2}


def web(**more: Any) -> dict[str, Any]:
    return Images(**{"hosts": ["127.0.0.1"], "private": True, **more}).spec()


def collect(folder: Path, references: dict[str, Any], spec: dict[str, Any], **runtime: Any) -> dict[str, Any]:
    """Run the stage; return its rows by item id, and its facts under "facts"."""
    items = items_file(folder / "items.parquet", references)
    manifest = folder / "out" / "manifest.parquet"
    facts = collect_images(spec, {**FAST, **runtime}, items, {}, manifest)
    return {"facts": facts, **{row["item_id"]: row for row in read_table(manifest, MANIFEST).to_pylist()}}


def drip(handler: Any) -> None:
    """Send single bytes without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    for _ in range(6000):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def endless(handler: Any) -> None:
    """Promise no length, and send 20 MB unless the client leaves."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(bytes(100_000))


def bare(answer: bytes) -> Any:
    def write(handler: Any) -> None:
        handler.wfile.write(answer)
        handler.close_connection = True

    return write


GOOD = image()
FAULTS: dict[str, tuple[Any, str, str, str]] = {
    "gone": (respond(b"", 410), "missing", "HTTP 410", "HTTP 410: there is no such image"),
    "forbidden": (respond(b"", 403), "failed", "HTTP 403", "HTTP 403"),
    "down": (respond(b"", 503), "failed", "HTTP 503", "HTTP 503"),
    "broken once": (in_turn(respond(b"", 500), respond(GOOD)), "ok", "", ""),
    "busy": (in_turn(respond(b"", 429, Retry_After="0"), respond(GOOD)), "ok", "", ""),
    "cut once": (in_turn(cut_short(GOOD), respond(GOOD)), "ok", "", ""),
    "cut": (cut_short(GOOD), "failed", "connection cut", "cut"),
    "silent": (bare(b""), "failed", "connection cut", "cut"),
    "truncated": (respond(GOOD[:-40]), "failed", "truncated", "corrupt: "),
    "empty": (respond(b""), "failed", "empty", "0 bytes"),
    "page": (respond(b"<html>no image", kind="text/html"), "failed", "not an image", "starts with b'<html>"),
    "packed": (respond(gzip.compress(GOOD), Content_Encoding="gzip"), "ok", "", ""),
    "packed twice": (respond(zlib.compress(gzip.compress(GOOD)), Content_Encoding="x-gzip, deflate"), "ok", "", ""),
    "only said to be packed": (respond(GOOD, Content_Encoding="gzip"), "ok", "", ""),
    "packed and cut": (
        respond(gzip.compress(GOOD)[:-20], Content_Encoding="gzip"),
        "failed",
        "truncated",
        "has no end",
    ),
    "packed bomb": (
        respond(gzip.compress(bytes(10**6)), Content_Encoding="gzip"),
        "failed",
        "too many bytes",
        "200000",
    ),
    "brotli": (respond(b"xxxx", Content_Encoding="br"), "failed", "bad answer", "Content-Encoding br"),
    "dot": (respond(image((1, 1), format="GIF")), "missing", "placeholder", "1 x 1"),
    "large": (respond(bytes(300_000)), "failed", "too many bytes", "more than the 200000 bytes allowed"),
    "endless": (endless, "failed", "too many bytes", "more than the 200000 bytes allowed"),
    "moved": (respond(b"", 302, Location="/good.jpg"), "ok", "", ""),
    "loop": (respond(b"", 302, Location="loop"), "failed", "redirects", "more than 5 redirects"),
    "away": (respond(b"", 301, Location="http://a.example.org/x"), "failed", "refused", "a.example.org is not in"),
    "file": (respond(b"", 301, Location="file:///etc/passwd"), "failed", "refused", "not http"),
    "user": (respond(b"", 301, Location="//u:p@127.0.0.1/x"), "failed", "refused", "user name"),
    "nowhere": (respond(b"", 307, Location="http://[x"), "failed", "bad answer", "Invalid IPv6"),
    "blank": (respond(b"", 302, Location="/img/no-img-sm._V1_.gif"), "missing", "placeholder", "no-img-sm"),
    "nonsense": (bare(b"what?\r\n\r\n"), "failed", "bad answer", "."),
    "rude": (bare(b"HTTP/1.1 400 \xff\xfe\x1b[31m\r\nContent-Length: 0\r\n\r\n"), "failed", "HTTP 400", "HTTP 400"),
    "nothing": (respond(b"", 204), "failed", "HTTP 204", "HTTP 204"),
}


def test_each_fault_has_its_status_and_reason(tmp_path: Path):
    with serving() as server:
        server.answers = {f"/{name}.jpg".replace(" ", "%20"): answer for name, (answer, *_) in FAULTS.items()}
        server.answers |= {"/loop": respond(b"", 302, Location="loop"), "/good.jpg": respond(GOOD)}
        references = {name: [server.url(f"/{name}.jpg")] for name in FAULTS} | {"good": [server.url("/good.jpg")]}
        rows = collect(tmp_path, references, web(max_bytes=200_000))
        # A candidate that fails leads on to the next; the image is then as good as any.
        second = {name: [urls[0], server.url("/good.jpg")] for name, urls in references.items()}
        server.asked.clear()
        both = collect(tmp_path / "second", second, web(max_bytes=200_000), attempts=1)
    assert {name: rows[name]["status"] for name in FAULTS} == {name: fault[1] for name, fault in FAULTS.items()}
    for name, (_, _, kind, reason) in FAULTS.items():
        assert reason in (rows[name]["error"] or ""), (name, rows[name]["error"])
        assert (rows[name]["error"] or "x").isprintable() and len(rows[name]["error"] or "") < 200
        assert not kind or rows["facts"]["reasons"][kind] >= 1, name
    assert rows["facts"]["reasons"]["too many bytes"] == 3 and rows["facts"]["images_missing"] == 3
    assert {both[name]["status"] for name in FAULTS} == {"ok"}
    assert len({both[name]["sha256"] for name in FAULTS}) == 1 and both["facts"]["distinct_images"] == 1
    assert not (tmp_path / "out" / ".downloads").exists() and not (tmp_path / "out" / ".fresh").exists()


def test_a_row_is_missing_only_if_all_its_urls_are(tmp_path: Path):
    with serving() as server:
        server.answers = {"/down": respond(b"", 503), "/good": respond(GOOD)}
        paths = {"gone": ["/a", "/b"], "perhaps": ["/a", "/down"], "found": ["/a", "/down", "/good"]}
        references = {name: list(map(server.url, several)) for name, several in paths.items()}
        rows = collect(tmp_path, {**references, "none": [], "blank": [" ", ""]}, web())
        assert server.asked.count("/a") == 1 and server.asked.count("/down") == 3  # attempts, whoever wants it
    assert {name: rows[name]["status"] for name in (*paths, "none", "blank")} == {
        "gone": "missing",
        "perhaps": "failed",
        "found": "ok",
        "none": "missing",
        "blank": "missing",
    }
    assert "404" in rows["perhaps"]["error"] and "503" in rows["perhaps"]["error"]
    assert rows["found"]["url"].endswith("/good") and rows["perhaps"]["url"].endswith("/a")


def test_404_for_all_images_is_not_an_error(tmp_path: Path):
    with serving() as server:
        rows = collect(tmp_path, {"a": [server.url("/a")], "b": [server.url("/b")]}, web())
    assert rows["facts"]["images_missing"] == 2 and rows["facts"]["reasons"] == {"HTTP 404": 2}


def test_a_dripping_response_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "LONGEST", 1)
    with serving() as server:
        server.answers = {"/drip": drip, "/good": respond(GOOD)}
        references = {"a": [server.url("/drip")], "b": [server.url("/good")]}
        started = time.monotonic()
        rows = collect(tmp_path, references, web(), timeout=1.5, attempts=2)
    assert rows["a"]["error"] == "no answer in time" and rows["b"]["status"] == "ok"
    assert time.monotonic() - started < 100, "the response takes 300 s"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else gets."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield int(unheard.getsockname()[1])


def test_unreachable_hosts_end_the_run_soon(tmp_path: Path, closed_port: int):
    dead = {f"i{n}": [f"http://127.0.0.1:{closed_port}/{n}.jpg"] for n in range(3000)}
    started = time.monotonic()
    with pytest.raises(UserError, match=r"none of 3000 images .* no host answered .*Check the network, and images\.h"):
        collect(tmp_path, dead, web(), pause=0.2)
    assert time.monotonic() - started < 60
    with serving() as server:
        server.answers = {"/good": respond(GOOD)}
        other = server.url("/good").replace("127.0.0.1", "localhost")
        rows = collect(tmp_path, {**dead, "good": [other]}, web(hosts=["127.0.0.1", "localhost"]), attempts=1)
    assert rows["facts"]["images_failed"] == 3000 and rows["good"]["status"] == "ok"
    assert rows["facts"]["reasons"] == {"no connection": 3000} and rows["facts"]["urls_asked"] < 1000


@pytest.mark.parametrize(
    ("url", "settings", "complaint"),
    [
        ("http://127.0.0.1:9/x.jpg", {"private": False}, "private address"),
        ("http://localhost:9/x.jpg", {"private": False, "hosts": ["localhost"]}, "private address"),
        ("http://[::1]/x", {"private": False, "hosts": ["::1"]}, "private address"),
        ("http://[::ffff:127.0.0.1]/x", {"private": False, "hosts": ["::ffff:7f00:1"]}, "private address"),
        ("http://2130706433/", {"private": False, "hosts": ["2130706433"]}, "unusual form"),
        ("http://0x7f.1/", {"private": False, "hosts": ["0x7f.1"]}, "unusual form"),
        ("http://127.1/", {"private": False, "hosts": ["127.1"]}, "unusual form"),
        ("http://0177.0.0.1/", {"private": False, "hosts": ["0177.0.0.1"]}, "unusual form"),
        ("http://2130706433/", {}, "not in images.hosts"),
        ("http://evil.example.com/x.jpg", {}, "not in images.hosts"),
        ("http://127.0.0.1.example.com/x.jpg", {}, "not in images.hosts"),
        ("http://127.0.0.1@evil.example.com/x.jpg", {}, "user name"),
        ("http://evil.example.com#@127.0.0.1/x", {}, "not in images.hosts"),
        ("http://evil.example.com\\@127.0.0.1/x", {}, "not a valid URL"),
        ("http://127.0.0.1:0/x", {}, "no host and port"),
        ("http://127.0.0.1:99999/x", {}, "not a valid URL"),
        ("http:///x", {}, "not a valid URL|no host"),
        ("file:///etc/passwd", {}, "not http or https"),
        ("data:image/png;base64,AAAA", {}, "not http or https"),
        ("x.jpg", {}, "not http or https"),
        ("http://[bad/x.jpg", {}, "Invalid IPv6"),
        ("http://127.0.0.1/" + "x" * 9000, {}, "the URL has 9017 characters"),
        ("http://\x7f/x", {}, "not in images.hosts|not a valid"),
    ],
)
def test_disallowed_urls_are_not_requested(tmp_path: Path, url: str, settings: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=f"none of 1 images could be downloaded(?s:.*)({complaint})"):
        collect(tmp_path, {"a": [url]}, web(**settings))


def test_wildcards_allow_all_subdomains():
    spec = web(hosts=["*.Example.com", "a.org"], private=False)
    allowed = ("http://x.example.com/a", "https://x.y.EXAMPLE.com:8443/a", "http://A.org/")
    assert [without_request(url, spec) for url in allowed] == [None, None, None]
    for url in ("http://example.com/a", "http://badexample.com/a", "http://b.a.org/", "http://a.org.evil.net/"):
        assert without_request(url, spec) is not None


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("/no-img-sm._V192198896_.gif", True),
        ("/noimage.jpg", True),
        ("/x/No_Image_tny.png", True),
        ("/a.no-image.gif", True),
        ("/casino-image.jpg", False),
        ("/piano_img.png", False),
        ("/no-image/real.jpg", False),
    ],
)
def test_known_placeholder_names_are_not_requested(path: str, missing: bool):
    outcome = without_request("http://127.0.0.1" + path, web())
    assert (outcome is not None and outcome.status == "missing") == missing


def test_odd_urls_are_quoted(tmp_path: Path):
    with serving() as server:
        odd = {"/gr%C3%BCn%20neu.jpg": "/grün neu.jpg", "/a.jpg": "/a.jpg \n", "/b.jpg?x=1": "/b.jpg?x=1#part"}
        server.answers = {quoted: respond(GOOD) for quoted in odd}
        rows = collect(tmp_path, {path: [" " + server.url(path)] for path in odd.values()}, web())
        assert sorted(server.asked) == sorted(odd)
    assert {rows[path]["status"] for path in odd.values()} == {"ok"}


def test_hostile_item_ids_are_not_file_names(tmp_path: Path):
    ids = ["../../x", "/etc/x", "y" * 300, "nul\0", "line\nend", "", "шляпа", "a/b"]
    with serving() as server:
        server.answers = {"/good": respond(GOOD)}
        rows = collect(tmp_path / "deep" / "er", {name: [server.url("/good")] for name in ids}, web())
    assert {rows[name]["status"] for name in ids} == {"ok"}
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".known.parquet", "items.parquet", "manifest.parquet", "shard-00000.parquet"]


def test_429_without_retry_after_slows_the_host_down(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with serving() as server:
        server.answers = {"/a": in_turn(respond(b"", 429), respond(GOOD))}
        rows = collect(tmp_path, {"a": [server.url("/a")]}, web(), rate=100.0)
    assert rows["a"]["status"] == "ok" and "slowing down to 50 requests a second" in caplog.text


def test_requests_have_no_encoding_and_no_cookies(tmp_path: Path):
    heard: list[dict[str, str]] = []

    def listen(handler: Any) -> None:
        heard.append({name.lower(): value for name, value in handler.headers.items()})
        respond(GOOD, Set_Cookie="a=1; Path=/")(handler)

    with serving() as server:
        server.answers = {"/a": listen, "/b": listen}
        collect(tmp_path, {"a": [server.url("/a")], "b": [server.url("/b")]}, web(), concurrency=1)
    assert len(heard) == 2 and all(headers["accept-encoding"] == "identity" for headers in heard)
    assert not any("cookie" in headers for headers in heard)


def test_offline_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving() as server:
        server.answers = {"/b.jpg": respond(GOOD)}
        collect(tmp_path, {"b": [server.url("/b.jpg")]}, web())
        monkeypatch.setenv("CM3_OFFLINE", "1")
        rows = collect(tmp_path, {"b": [server.url("/b.jpg")], "c": []}, web())
        assert rows["b"]["sha256"] == hashlib.sha256(GOOD).hexdigest() and rows["facts"]["images_known_before"] == 1
        with pytest.raises(UserError, match=r"CM3_OFFLINE is set, and the images of 1 items .*images\.folder"):
            collect(tmp_path, {"a": [server.url("/a.jpg")], "b": [server.url("/b.jpg")]}, web())
        assert server.asked == ["/b.jpg"]


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path):
    items = items_file(tmp_path / "items.parquet", {str(n): [f"http://127.0.0.1:9/{n}"] for n in range(20)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"journal: File too large; make room and run the same command again"):
            collect_images(web(), FAST, items, {}, tmp_path / "out" / "manifest.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
