"""Sizes of published files before their download."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cm3.datasets.download.sizes import published_sizes

ANSWERED = threading.Event()
"""Set when the slow address may answer."""

SIZES = {"/meta.json.gz": "52428800", "/unstated": None, "/odd": "many"}


class Headers(BaseHTTPRequestHandler):
    """Answers HEAD requests alone; another request is a failure of the test."""

    def do_HEAD(self) -> None:
        if self.path == "/slow":
            ANSWERED.wait(60)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/meta.json.gz")
        else:
            self.send_response(200 if self.path in SIZES else 404)
            if length := SIZES.get(self.path, "7"):
                self.send_header("Content-Length", length)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Headers) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("paths", "size"),
    [
        (["/meta.json.gz"], 52428800),
        (["/moved"], 52428800),
        (["/missing", "/meta.json.gz"], 52428800),
        (["/missing"], None),
        (["/unstated"], None),
        (["/odd"], None),
    ],
)
def test_the_first_mirror_that_has_the_file_states_its_size(server: str, paths: list[str], size: int | None):
    assert published_sizes([{"urls": [server + path for path in paths], "size": None}]) == [size]


def test_nobody_is_asked_for_a_size_that_is_known():
    assert published_sizes([{"urls": ["http://host.invalid/a"], "size": 5}]) == [5]


def test_without_an_answer_in_time_the_size_is_unknown(server: str):
    ANSWERED.clear()
    files = [{"urls": [server + path], "size": None} for path in ("/slow", "/meta.json.gz")]
    try:
        # Three seconds, of which the other file needs a hundredth: a busy machine is slower.
        assert published_sizes(files, seconds=3) == [None, 52428800]
    finally:
        ANSWERED.set()


def test_without_a_network_the_size_is_unknown():
    assert published_sizes([{"urls": ["http://127.0.0.1:9/a"], "size": None}]) == [None]
