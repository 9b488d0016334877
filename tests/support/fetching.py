"""Downloads from a faulty server, for the tests of the download stage."""

import gzip
import hashlib
import random
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from faulty_server import Answer
from oracles_sources import Server, serving

from cm3.common.errors import UserError
from cm3.datasets.download.stage import download

BODY = gzip.compress(b"some reviews\n" * 5000, mtime=0)
NOISE = random.Random(0).randbytes(100_000)
LATELY = formatdate(time.time() - 3600, usegmt=True)


def fetch(server: Server, file: Path, *paths: str, **options) -> dict:
    settings = {"attempts": 3, "pause": 0.01, "timeout": 60.0, **options}
    return download([server.url(path) for path in paths], file, **settings)


def hidden(tmp_path: Path, name: str = "a.bin") -> list[Path]:
    return [tmp_path / f".{name}.partial", tmp_path / f".{name}.partial.json"]


def fetch_noise(tmp_path: Path, answers: dict[str, Answer], *paths: str, body: bytes = NOISE, **options) -> dict:
    """Download a.bin and check its bytes, and that nothing else is left."""
    with serving() as server:
        server.answers = answers
        facts = fetch(server, tmp_path / "a.bin", *(paths or ("/a",)), **options)
    assert (tmp_path / "a.bin").read_bytes() == body
    assert facts["bytes"] == len(body) and facts["sha256"] == hashlib.sha256(body).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    return facts


def fail_noise(tmp_path: Path, answers: dict[str, Answer], *paths: str, name: str = "a.bin", **options) -> str:
    with serving() as server:
        server.answers = answers
        with pytest.raises(UserError) as error:
            fetch(server, tmp_path / name, *(paths or ("/a",)), **options)
    assert not (tmp_path / name).exists()
    return str(error.value)
