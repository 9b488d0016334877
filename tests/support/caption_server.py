"""A loopback captioning server that says which colour a posted image has, and any trouble that a test asks for."""

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
_LONGEST_HANG = 5.0


@dataclass(frozen=True)
class Asked:
    """A request for a caption: its number among all, how often this image and prompt were asked for before."""

    number: int
    before: int
    colour: str
    prompt: str
    request: dict[str, Any]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Said:
    """An answer in place of the caption."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def error(status: int, message: str, *headers: tuple[str, str], **more: Any) -> Said:
    """An error as OpenAI's API words it."""
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


def hang(seconds: float = _LONGEST_HANG) -> Callable[["CaptionServer"], None]:
    """Say nothing, with the connection open."""
    return lambda server: server.closing.wait(min(seconds, _LONGEST_HANG)) and None


Trouble = Callable[[Asked], "Said | Callable[[CaptionServer], None] | None"]


class CaptionServer(http.server.ThreadingHTTPServer):
    """Answers /v1/models and /v1/chat/completions; `trouble` may answer in its stead, and None leaves it to the server.

    Attributes:
        asked: all requests for captions so far.
        peak: the most that were under way at once.
        delay: seconds before each answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, trouble: Trouble | None = None, models: Said | None = None, delay: float = 0.0, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.trouble, self.models, self.delay = trouble or (lambda asked: None), models, delay
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[Asked] = []
        self.running = self.peak = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._before: collections.Counter[tuple[str, str]] = collections.Counter()

    def note(self, request: dict[str, Any], headers: Mapping[str, str]) -> Asked:
        image, prompt = request["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as decoded:
            mean = np.asarray(decoded.convert("RGB"), float).mean(axis=(0, 1))
        colour = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
        with self.lock:
            key = (colour, prompt["text"])
            asked = Asked(len(self.asked), self._before[key], colour, prompt["text"], request, headers)
            self._before[key] += 1
            self.asked.append(asked)
        return asked

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer takes 40 ms
    timeout = 20

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
            said = server.trouble(asked) if asked.number < _MOST_REQUESTS else error(403, "asked far too often")
        finally:
            with server.lock:
                server.running -= 1
        if callable(said):
            said(server)
            self.close_connection = True
            return
        self._send(said or completion(f" a {asked.colour} product\n", request["model"]))

    def _send(self, said: Said) -> None:
        with contextlib.suppress(OSError):
            self.send_response(said.status)
            for name, value in said.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said.body)))
            self.end_headers()
            self.wfile.write(said.body)


@contextmanager
def serving(
    trouble: Trouble | None = None, models: Said | None = None, delay: float = 0.0, port: int = 0
) -> Iterator[CaptionServer]:
    """Run a server while the body runs."""
    with CaptionServer(trouble, models, delay, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_time_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
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
        "timeout": 10.0,
        "patience": 20.0,
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


def once(said: Any) -> Trouble:
    """Trouble at the first request for each image."""
    return lambda asked: said if asked.before == 0 else None


def many(count: int) -> list[dict[str, Any]]:
    return [{"title": str(n), "image": plain("red", (8, 8))} for n in range(count)]
