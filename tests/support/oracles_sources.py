"""Slow, independent recomputations of k-core and split, and small inputs for the tests of sources."""

import collections
import gzip
import http.server
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
from PIL import Image

from cm3.common.tables import ITEMS, write_table
from cm3.datasets.prepare import prepare
from cm3.datasets.registry import parse_dataset


def kcore_oracle(pairs: Sequence[tuple[int, int]], k: int) -> list[bool]:
    """Drop one offending user or item at a time until none is left."""
    alive = set(range(len(pairs)))
    while True:
        users = collections.Counter(pairs[row][0] for row in alive)
        items = collections.Counter(pairs[row][1] for row in alive)
        user = next((u for u, n in users.items() if n < k), None)
        item = next((i for i, n in items.items() if n < k), None)
        if user is not None:
            alive -= {row for row in alive if pairs[row][0] == user}
        elif item is not None:
            alive -= {row for row in alive if pairs[row][1] == item}
        else:
            return [row in alive for row in range(len(pairs))]


def split_sizes_oracle(n: int) -> tuple[int, int, int]:
    """Train, valid and test sizes of a user with n interactions, as the rule says in words."""
    if n < 10:
        return n - 2, 1, 1
    held = int(0.2 * n)
    valid = held // 2
    return n - held, valid, held - valid


def dataset(
    tmp_path: Path, interactions: str, items: str | None = None, **settings: Any
) -> Callable[[], dict[str, Any]]:
    """Write the tables (csv and jsonl) of a `files` data set; the result runs the prepare stage on it."""
    (tmp_path / "interactions.csv").write_text(interactions)
    columns = {"user": "user", "item": "item"}
    header = interactions.partition("\n")[0].split(",")
    columns |= {name: name for name in ("rating", "timestamp") if name in header}
    data: dict[str, Any] = {
        "source": "files",
        "interactions": {"path": str(tmp_path / "interactions.csv"), "columns": columns},
        **settings,
    }
    if items is not None:
        (tmp_path / "items.jsonl").write_text(items)
        fields = {
            name: name for name in ("title", "brand", "categories", "description", "image") if f'"{name}"' in items
        }
        data["items"] = {"path": str(tmp_path / "items.jsonl"), "columns": {"item_id": "item_id", **fields}}
    return lambda: run_prepare(tmp_path, data)


def run_prepare(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Run the prepare stage of a data set's config; tables go to `folder`."""
    config = parse_dataset("mine", data, "datasets.mine")
    inputs = {name: Path(path) for name, path in config.prepare_inputs("mine").items()}
    outputs = {name: folder / f"{name}.parquet" for name in ("ratings", "items", "users")}
    return prepare(config.prepare_spec(), inputs, stats=folder / "stats.json", **outputs)


def grid(users: int, items: int) -> str:
    """A csv in which every user has every item, in time order."""
    rows = [f"u{u},i{i},{1 + (u + i) % 5},{1_600_000_000 + u * items + i}" for u in range(users) for i in range(items)]
    return "user,item,rating,timestamp\n" + "\n".join(rows) + "\n"


def jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def gz(path: Path, lines: Sequence[str]) -> Path:
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))
    return path


def image(size: tuple[int, int] = (40, 30), colour: str = "red", format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(file, format) if colour == "noise" else Image.new(
        "RGB", size, colour
    ).save(file, format)
    return file.getvalue()


def items_file(path: Path, references: dict[str, Sequence[str]]) -> Path:
    """Write an items.parquet of ids and their image references."""
    ids = list(references)
    empty = [""] * len(ids)
    table = pa.table(
        {
            "item": list(range(len(ids))),
            "item_id": ids,
            "title": empty,
            "brand": empty,
            "categories": [[] for _ in ids],
            "description": empty,
            "features": [[] for _ in ids],
            "details": [[] for _ in ids],
            "price": [None for _ in ids],
            "sales_rank": [None for _ in ids],
            "image_urls": [list(r) for r in references.values()],
        },
        schema=ITEMS,
    )
    write_table(path, table, ITEMS)
    return path


class Server(http.server.ThreadingHTTPServer):
    """A loopback server: `answers[path]` is called with the handler, at most as often as a test can bear."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path)
        if answer is None or len(self.server.asked) > 100:
            self.send_error(404)
        else:
            answer(self)

    def log_message(self, format: str, *values: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        # A proxy in the environment of whoever runs the tests is not asked for a loopback address.
        with mock.patch.dict(os.environ, {"no_proxy": "*"}):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def respond(
    body: bytes, status: int = 200, kind: str = "application/octet-stream", **headers: str
) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """An answer with a body; header names are written with _ for -."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cut_short(body: bytes) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """An answer that promises the whole body and closes the connection half way."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.close_connection = True

    return answer


def in_turn(*answers: Callable[[Any], None]) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """Another answer each time; the last one from then on."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)
