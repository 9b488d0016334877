"""Hub models without a revision: the commit is found once, written down with the data, and then always the same."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from extractors import parse_extractor
from extractors.weights import revisions

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
HUB = {"modality": "text", "backend": "sentence-transformers", "model": "org/name"}


class Hub:
    """What answers in place of the hub."""

    def __init__(self) -> None:
        self.commit, self.asked = COMMIT, 0

    def model_info(self, repository: str) -> Any:
        self.asked += 1
        if not self.commit:
            raise ConnectionError("no route to huggingface.co\nmore of it")
        return SimpleNamespace(sha=self.commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A working folder with data, an empty cache, and a hub."""
    answering = Hub()
    (tmp_path / "processed").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CM3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: answering)
    revisions.warn_once.cache_clear()
    return answering


def parse(**more: Any) -> Any:
    return parse_extractor("mine", HUB | more, "extractors.mine")


def test_the_newest_commit_is_found_once_and_stays(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    first = parse()
    assert hub.asked == 0, "parsing a config asks nobody"
    identity = first.identity()
    assert identity["revision"] == COMMIT
    assert json.loads(Path("processed/.revisions.json").read_text()) == {"org/name": COMMIT}
    hub.commit = OTHER
    assert parse().identity() == first.identity() == identity and hub.asked == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"revision: {COMMIT}" in caplog.text and str(Path.cwd() / "processed" / ".revisions.json") in caplog.text


def test_pinning_what_the_warning_says_changes_no_key(hub: Hub) -> None:
    pinned = parse(revision=COMMIT)
    assert key_of(parse().identity()) == key_of(pinned.identity()) and hub.asked == 1
    assert key_of(parse(revision=OTHER).identity()) != key_of(pinned.identity())


def test_a_job_gets_the_commit_and_looks_nothing_up(hub: Hub) -> None:
    spec = parse()
    planned = parse_extractor("mine", spec.settings() | spec.runtime(), "extractors.mine")
    Path("processed/.revisions.json").unlink()
    assert planned.revision == COMMIT and planned.identity() == parse(revision=COMMIT).identity() and hub.asked == 1


def test_other_models_in_the_record_stay(hub: Hub) -> None:
    parse(model="org/other").identity()
    hub.commit = OTHER
    parse().identity()
    assert json.loads(Path("processed/.revisions.json").read_text()) == {"org/name": OTHER, "org/other": COMMIT}


def test_without_data_the_record_lies_in_the_users_cache(hub: Hub) -> None:
    Path("processed").rmdir()
    parse().identity()
    assert json.loads(Path("cache/.revisions.json").read_text()) == {"org/name": COMMIT}
    assert not Path("processed").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', '{"org/name": "main"}', '{"org/name": 3}'])
def test_a_record_that_somebody_broke_is_refused(hub: Hub, text: str) -> None:
    Path("processed/.revisions.json").write_text(text)
    with pytest.raises(UserError, match=r"\.revisions\.json: .*delete"):
        parse().identity()


def test_a_hub_out_of_reach_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit = ""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("empty")))
    with pytest.raises(UserError) as error:
        parse().identity()
    message = str(error.value)
    assert "cannot be asked for the newest (ConnectionError: no route to huggingface.co)" in message
    assert (
        "Set revision to a commit" in message and "weights to a local folder" in message and "more of it" not in message
    )
    with pytest.raises(UserError, match="local_files_only is set"):
        parse(local_files_only=True).identity()
    assert not Path("processed/.revisions.json").exists()


ASK = f"""
import sys
from extractors import parse_extractor
from cm3.common.errors import UserError
try:
    print(parse_extractor("mine", {HUB!r}, "mine").identity()["revision"])
except UserError as error:
    print("refused:", error)
print([name for name in ("torch", "huggingface_hub", "requests", "httpx", "transformers") if name in sys.modules])
"""


def offline(folder: Path, cache: Path) -> list[str]:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "CM3_CACHE": str(folder / "c")}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout.splitlines()


def test_offline_the_newest_download_counts_and_later_no_library_is_loaded(tmp_path: Path) -> None:
    assert offline(tmp_path, tmp_path / "hub")[0].startswith("refused: org/name: no revision is set")
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert offline(tmp_path, tmp_path / "hub")[0] == COMMIT
    assert offline(tmp_path, tmp_path / "nowhere") == [COMMIT, "[]"]
