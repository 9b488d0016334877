"""Raw files that users put in place are never deleted, downloaded ones are not downloaded twice, secrets stay secret."""

import gzip
import hashlib
import http.server
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import Checkout

from cm3.common.files import read_json

STATS = "processed/shop/stats.json"
RATINGS, META = "ratings_Toys.csv", "meta_Toys.json.gz"
SECRETS = ("pa55word", "t0ken")


def published() -> dict[str, bytes]:
    """The files of a tiny shop by their published names."""
    rng = random.Random(1)
    ratings = "".join(
        f"A{user:013d},B{item:09d},{rng.randint(1, 5)}.0,{1_300_000_000 + user * 86_400 + item}\n"
        for user in range(30)
        for item in rng.sample(range(20), 8)
    )
    meta = "".join(f"{ {'asin': f'B{item:09d}', 'title': f'thing {item}'}!r}\n" for item in range(20))
    return {RATINGS: ratings.encode(), META: gzip.compress(meta.encode(), mtime=0)}


class Server:
    """A mirror on loopback. Attributes: url, asked: the paths of all requests, authorized: their Authorization."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.authorized: list[str | None] = []


@pytest.fixture
def mirror() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            served.authorized.append(self.headers["Authorization"])
            body = published().get(self.path.partition("?")[0].rpartition("/")[2])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Server(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield served
        server.shutdown()


def config(mirror: str, **settings: Any) -> dict[str, Any]:
    shop = {"source": "amazon-2014", "category": "Toys", "kcore": 3, "mirrors": [mirror], **settings}
    experiment = {"dataset": "shop", "model": {"name": "mostpop"}, "evaluation": {"ks": [5]}}
    return {"datasets": {"shop": shop}, "extractors": {}, "experiments": {"shop": experiment}}


def put_by_hand(folder: Path) -> dict[Path, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / name: content for name, content in published().items()}
    for path, content in files.items():
        path.write_bytes(content)
    return files


def unchanged(files: dict[Path, bytes]) -> bool:
    return all(path.read_bytes() == content for path, content in files.items())


def test_files_of_a_user_survive_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CM3_OFFLINE", "1")
    checkout = Checkout(tmp_path / "checkout", config("http://127.0.0.1:9"))
    archive = put_by_hand(tmp_path / "archive")
    (checkout.folder / "raw").mkdir()
    (checkout.folder / "raw/shop").symlink_to(tmp_path / "archive")
    for arguments in ([], ["-F"], ["-R", "download"], ["--delete-all-output"], ["-F"]):
        checkout.run(*arguments, "--", STATS)
        assert unchanged(archive), arguments
    assert checkout.planned(STATS) == {}
    # The right checksum is only compared, a wrong one is refused, and the file stays.
    right = hashlib.sha256(published()[RATINGS]).hexdigest()
    checkout.configure(config("http://127.0.0.1:9", sha256={RATINGS: right}))
    assert "download" not in checkout.planned(STATS)
    checkout.run(STATS)
    checkout.configure(config("http://127.0.0.1:9", sha256={RATINGS: "0" * 64}))
    output = checkout.run(STATS, check=False)
    assert f"its sha256 is {right} and not {'0' * 64}" in output
    assert unchanged(archive)


def test_a_downloaded_file_is_kept_and_not_downloaded_again(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkout = Checkout(tmp_path / "checkout", config(mirror.url))
    checkout.run(STATS)
    downloads = checkout.folder / "raw/shop/download/categoryFiles"
    files = {downloads / name: content for name, content in published().items()}
    assert unchanged(files) and len(mirror.asked) == 2
    assert checkout.planned(STATS) == {}
    monkeypatch.setenv("CM3_OFFLINE", "1")
    for arguments in (["-F"], ["-R", "download"]):
        checkout.run(*arguments, "--", STATS)
        assert unchanged(files)
    right = hashlib.sha256(published()[RATINGS]).hexdigest()
    sizes = {name: len(content) for name, content in published().items()}
    for arguments in ([], ["-F"]):
        checkout.configure(config(mirror.url, sha256={RATINGS: right}, sizes=sizes))
        checkout.run(*arguments, "--", STATS)
        checkout.configure(config(mirror.url, sha256={RATINGS: "0" * 64}))
        output = checkout.run(*arguments, "--", STATS, check=False)
        assert f"its sha256 is {right} and not {'0' * 64}" in output
        assert unchanged(files) and len(mirror.asked) == 2
    checkout.configure(config(mirror.url))
    checkout.run(STATS)
    assert read_json(checkout.folder / "processed/shop/prepare.stage.json")["raw"]["meta"]["url"] == (
        f"{mirror.url}/categoryFiles/{META}"
    )
    # A user's file takes the place of a downloaded one, and both stay.
    by_hand = put_by_hand(checkout.folder / "raw/shop")
    assert checkout.planned(STATS).keys() >= {"prepare"}
    checkout.run(STATS)
    assert unchanged(by_hand) and unchanged(files)
    assert read_json(checkout.folder / "processed/shop/prepare.stage.json")["raw"]["meta"]["url"] is None


def test_files_that_an_earlier_release_downloaded_stay_where_they_are(mirror: Server, tmp_path: Path):
    checkout = Checkout(tmp_path / "checkout", config(mirror.url))
    checkout.run(STATS)
    # As release 0.1.0 left them: next to the place of a user's files, with a record, and as inputs of `prepare`.
    raw = checkout.folder / "raw/shop"
    for path in list((raw / "download/categoryFiles").iterdir()):
        path.rename(raw / path.name)
    shutil.rmtree(raw / "download")
    metadata = checkout.folder / "processed/.snakemake-metadata"
    for record in [path for path in metadata.rglob("*") if path.is_file()]:
        record.write_text(record.read_text().replace("raw/shop/download/categoryFiles/", "raw/shop/"))
    assert checkout.planned(STATS) == {}
    checkout.run("-F", "--", STATS)
    assert len(mirror.asked) == 2
    raws = read_json(checkout.folder / "processed/shop/prepare.stage.json")["raw"]
    assert raws["meta"]["url"] == f"{mirror.url}/categoryFiles/{META}"


@pytest.mark.parametrize("fails", [False, True])
def test_secrets_of_a_mirror_are_neither_printed_nor_written(mirror: Server, tmp_path: Path, fails: bool):
    place = "nowhere" if fails else "tree"
    url = mirror.url.replace("//", f"//me:{SECRETS[0]}@") + f"/{place}?sig={SECRETS[1]}"
    checkout = Checkout(tmp_path / "checkout", config(mirror.url))
    (checkout.folder / "config/config.yaml").unlink()
    checkout.configure(config(url) if not fails else config(url, category="Books"))
    secret = checkout.folder / "config/config.yaml"
    target = STATS if fails else "results/shop/metrics.json"
    output = checkout.run("-p", target, check=not fails)
    assert {path.partition("?")[2] for path in mirror.asked} == {f"sig={SECRETS[1]}"}
    assert all(mirror.authorized)
    if not fails:
        assert mirror.asked[0].startswith("/tree/categoryFiles/")
        metrics = read_json(checkout.folder / target)
        assert metrics["raw"]["meta"]["url"] == f"{mirror.url}/tree/categoryFiles/{META}"
    for shown in SECRETS:
        assert shown not in output
    for folder, _, names in os.walk(checkout.folder):
        for path in (Path(folder, name) for name in names):
            if path != secret:
                content = path.read_bytes()
                assert not any(shown.encode() in content for shown in SECRETS), path
