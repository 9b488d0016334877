"""A local captioning server that names the colour of a posted image, or fails as a test asks."""

import base64
import collections
import contextlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fixtures_extractors import COLOURS, plain, write_images, write_items
from PIL import Image

import extractors
from extractors.caption import openai_retry
from extractors.caption.openai import ServerCaptioner, ServerCaptionSpec

MODEL = "colour-teller"
KEY = "sk-very-secret-0123456789"
NAMES = [*COLOURS, *COLOURS]
ITEMS = [{"title": f"thing {n}", "image": plain(name, (40, 30))} for n, name in enumerate(NAMES)]
ANSWERS = [f"a {name} product" for name in NAMES]
_MOST_REQUESTS = 500
_LONGEST_HANG = 300.0


@dataclass(frozen=True)
class Asked:
    """A caption request: its number, and how many earlier requests had the same colour and prompt (`before`)."""

    number: int
    before: int
    colour: str
    prompt: str
    request: dict[str, Any]
    headers: Mapping[str, str]
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Said:
    """A response in place of the caption.

    Attributes:
        drip: seconds between the bytes of the body.
    """

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    drip: float = 0.0


def error(status: int, message: str, *headers: tuple[str, str], **more: Any) -> Said:
    """An error response of OpenAI's API."""
    return Said(status, json.dumps({"error": {"message": message, **more}}).encode(), headers)


def completion(text: Any, model: str = MODEL, end: str = "stop", **more: Any) -> Said:
    """A chat completion."""
    data = {
        "id": "c1",
        "object": "chat.completion",
        "model": model,
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "finish_reason": end, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
    return Said(body=json.dumps(data | more).encode())


def hang() -> Callable[["CaptionServer"], None]:
    """Keep the connection open without an answer, until the server ends."""
    return lambda server: server.closing.wait(_LONGEST_HANG) and None


Failure = Callable[[Asked], "Said | Callable[[CaptionServer], None] | None"]


class CaptionServer(http.server.ThreadingHTTPServer):
    """Answers /v1/models and /v1/chat/completions; `failure` may replace an answer, or return None.

    Attributes:
        asked: all caption requests so far.
        peak: the largest number of concurrent requests.
        delay: seconds before each answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, failure: Failure | None = None, models: Said | None = None, delay: float = 0.0, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.failure, self.models, self.delay = failure or (lambda asked: None), models, delay
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[Asked] = []
        self.running = self.peak = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._before: collections.Counter[tuple[str, str]] = collections.Counter()

    def note(self, request: dict[str, Any], headers: Mapping[str, str]) -> Asked:
        image, prompt = request["messages"][-1]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as decoded:
            size = decoded.size
            mean = np.asarray(decoded.convert("RGB"), float).mean(axis=(0, 1))
        colour = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
        with self.lock:
            key = (colour, prompt["text"])
            asked = Asked(len(self.asked), self._before[key], colour, prompt["text"], request, headers, size)
            self._before[key] += 1
            self.asked.append(asked)
        return asked

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer takes 40 ms
    timeout = 120

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        server = cast(CaptionServer, self.server)
        listed = {"object": "list", "data": [{"id": MODEL, "root": "org/colours"}]}
        self._send(server.models or Said(body=json.dumps(listed).encode()))

    def do_POST(self) -> None:
        server = cast(CaptionServer, self.server)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.running += 1
            server.peak = max(server.peak, server.running)
        try:
            asked = server.note(request, self.headers)
            if server.delay:
                time.sleep(server.delay)
            said = server.failure(asked) if asked.number < _MOST_REQUESTS else error(403, "asked far too often")
        finally:
            with server.lock:
                server.running -= 1
        if callable(said):
            said(server)
            self.close_connection = True
            return
        self._send(said or completion(f" a {asked.colour} product\n", request["model"]))

    def _send(self, said: Said) -> None:
        server = cast(CaptionServer, self.server)
        with contextlib.suppress(OSError):
            self.send_response(said.status)
            for name, value in said.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said.body)))
            self.end_headers()
            for start in range(0, len(said.body), 1 if said.drip else len(said.body)):
                if start and server.closing.wait(said.drip):
                    return
                self.wfile.write(said.body[start : start + 1] if said.drip else said.body)


@contextmanager
def serving(
    failure: Failure | None = None, models: Said | None = None, delay: float = 0.0, port: int = 0
) -> Iterator[CaptionServer]:
    """Run a server while the body runs."""
    with CaptionServer(failure, models, delay, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retry, "PAUSE", 0.01)
    monkeypatch.setattr(openai_retry, "LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def spec_of(url: str, **more: Any) -> ServerCaptionSpec:
    data = {
        "modality": "caption",
        "backend": "openai-caption",
        "url": url,
        "model": MODEL,
        "encoder": "text",
        "prompt": "{title} What is it?",
        "attempts": 3,
        "timeout": 60.0,
        "patience": 120.0,
    }
    spec = extractors.parse_extractor("teller", data | more, "extractors.teller")
    assert isinstance(spec, ServerCaptionSpec)
    return spec


def captions(url: str, items: Any = ITEMS, **more: Any) -> Any:
    captioner = spec_of(url, **more).load()
    assert isinstance(captioner, ServerCaptioner)
    return captioner.caption(items)


def tables(folder: Path, names: list[str | None]) -> dict[str, Path]:
    images = [None if name is None else plain(name, (40, 30)) for name in names]
    return {
        "items": write_items(folder, [{"title": f"thing {n}"} for n in range(len(names))]),
        "manifest": write_images(folder / "images", images),
    }


def once(said: Any) -> Failure:
    """Fail the first request for each image."""
    return lambda asked: said if asked.before == 0 else None


def at_once(count: int) -> Failure:
    """Answer none of the first `count` requests before all of them are there."""
    barrier = threading.Barrier(count)

    def wait(asked: Asked) -> None:
        if asked.number < count:
            barrier.wait(60)

    return wait


class Clock:
    """A clock that goes `step` seconds ahead each time that it is read.

    Attributes:
        step: may be changed while the clock is in use.
    """

    def __init__(self, step: float = 0.0) -> None:
        self.step, self._ahead = step, 0.0

    def monotonic(self) -> float:
        self._ahead += self.step
        return time.monotonic() + self._ahead


def many(count: int) -> list[dict[str, Any]]:
    return [{"title": str(n), "image": plain("red", (8, 8))} for n in range(count)]
