"""A captioning server in every kind of trouble: what passes, what one item pays for, and what ends the job."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from caption_server import (
    ANSWERS,
    ITEMS,
    KEY,
    Asked,
    Said,
    captions,
    completion,
    error,
    hang,
    many,
    no_time_to_lose,
    once,
    serving,
    spec_of,
)
from fixtures_extractors import plain

from cm3.common.errors import UserError
from extractors.caption import openai_retry
from extractors.caption.base import PROMPT
from extractors.caption.openai import ServerCaptioner

__all__ = ["no_time_to_lose"]  # used by every test here


@pytest.mark.parametrize(
    "said",
    [
        error(500, "oh"),
        error(502, "oh"),
        error(503, "loading"),
        error(408, "slow"),
        error(429, "slow down"),
        Said(body=b"<html>"),
        Said(body=b"{}"),
        Said(body=b"[" * 90_000),
        completion(""),
        completion(None),
        completion([]),
        Said(body=b"x" * (1 << 21)),
        Said(200, b"zz", (("Content-Encoding", "gzip"),)),
        completion("x", usage=[1]),
        lambda server: None,
    ],
)
def test_trouble_that_passes_leaves_no_trace(said: Any) -> None:
    with serving(once(said)) as server:
        result = captions(server.url)
    assert result.captions == ANSWERS and len(server.asked) == 24


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (error(500, "CUDA error"), r"^HTTP 500 \(CUDA error\), 4 times$"),
        (Said(body=b"<html>it works"), r"no chat completion \(<html>it works\), 4 times"),
        (completion(" \n", end="content_filter"), r"the answer is empty \(finish_reason content_filter\), 4 times"),
        (error(400, "context length is 4096"), r"^HTTP 400 \(context length is 4096\)$"),
        (error(413, "too large"), r"^HTTP 413 \(too large\)$"),
        (completion("word " * 2000), "10000 letters"),
        (hang(), "no answer in 0.3 s, 4 times"),
        (Said(500, b"\x1b[31m\xff " * 500), r"HTTP 500 \(\?\[31m"),
    ],
)
def test_trouble_with_one_item_that_stays_fails_that_item_alone(said: Any, reason: str) -> None:
    with serving(lambda asked: said if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url, timeout=0.3 if callable(said) else 10.0)
    assert result.captions == [*ANSWERS[:4], "", *ANSWERS[5:]] and result.status[4] == "failed"
    assert set(result.errors) == {4}
    assert re.search(reason, result.errors[4]), result.errors[4]
    assert len(result.errors[4]) < 300


def test_retry_after_makes_all_requests_wait() -> None:
    times: list[float] = []

    def trouble(asked: Asked) -> Said | None:
        times.append(time.monotonic())
        return error(429, "slow down", ("Retry-After", "1")) if asked.number == 2 else None

    with serving(trouble, delay=0.02) as server:
        result = captions(server.url, concurrency=2)
    assert result.captions == ANSWERS and server.peak == 2
    gaps = np.diff(times)
    # Until the answer has been read, the other worker sends some more.
    assert (gaps > 0.9).sum() == 1 and 2 <= gaps.argmax() <= 8 and len(times) == 13


def test_a_request_told_to_wait_for_ever_fails_alone_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retry, "SHARED_WAITS", 2)
    monkeypatch.setattr(openai_retry, "MOST_WAITS", 6)
    refuse = error(429, "request too large")
    with serving(lambda asked: refuse if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url)
    assert result.errors == {4: "HTTP 429 (request too large), 8 times"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), r"HTTP 401, the key in .* MY_KEY is refused \(.*\*\*\*\)"),
        (error(403, "no"), r"HTTP 403 \(no\), the key lacks permission"),
        (error(404, "The model `colour-teller` does not exist."), "HTTP 404 .*does not exist.*no such model"),
        (error(429, "you ran out", code="insufficient_quota"), "HTTP 429 .*the quota is used up"),
        (error(429, "later", ("Retry-After", "3600")), "asks for a pause of 3600 s"),
        (Said(302, b"", (("Location", "http://example.org/"),)), "HTTP 302, a redirect"),
    ],
)
def test_what_no_patience_heals_ends_the_job_at_once(said: Said, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda asked: said) as server, pytest.raises(UserError, match=told) as stopped:
        captions(server.url, api_key_env="MY_KEY")
    assert server.url in str(stopped.value) and KEY not in str(stopped.value)
    assert "Finished shards are kept" in str(stopped.value) or "401" in told
    assert len(server.asked) <= 8


@pytest.mark.parametrize(
    "said", [error(500, "oh"), Said(body=b"garbage"), completion(""), error(400, "no images, please")]
)
def test_twenty_failures_at_the_beginning_end_the_job(said: Said) -> None:
    items = [{"title": str(n), "image": plain("red", (8, 8))} for n in range(60)]
    with serving(lambda asked: said) as server, pytest.raises(UserError, match="the first 20 requests got no caption"):
        captions(server.url, items, attempts=2)
    assert len(server.asked) < 60


@pytest.mark.parametrize(
    "said", [error(500, "oh"), Said(body=b"garbage"), completion(""), error(400, "no images, please")]
)
def test_a_server_that_answers_nothing_ends_a_job_of_few_items_too(said: Said) -> None:
    told = "3 requests got no caption, and neither did one for a plain white image: .*Finished shards are kept"
    with serving(lambda asked: said) as server, pytest.raises(UserError, match=told):
        captions(server.url, many(3), attempts=2)
    assert server.asked[-1].colour == "white" and server.asked[-1].prompt == PROMPT


def test_few_items_that_are_all_refused_fail_where_a_plain_image_is_answered() -> None:
    with serving(lambda asked: None if asked.colour == "white" else error(400, "unsafe")) as server:
        result = captions(server.url, many(3))
    assert result.status.tolist() == ["failed"] * 3 and result.errors[0] == "HTTP 400 (unsafe)"


@pytest.mark.parametrize("said", [error(400, "unsafe"), error(500, "CUDA error")])
def test_any_number_of_refused_images_fails_alone_while_others_are_answered(said: Said) -> None:
    with serving(lambda asked: None if asked.prompt.startswith("0 ") else said) as server:
        result = captions(server.url, many(50), concurrency=1, attempts=1)
    assert result.status.tolist() == ["ok"] + ["failed"] * 49


def test_failures_before_the_first_good_answer_are_asked_for_again() -> None:
    with serving(lambda asked: error(500, "warming up") if asked.number < 10 else None) as server:
        result = captions(server.url, many(12), concurrency=2, attempts=1)
    assert result.status.tolist() == ["ok"] * 12 and len(server.asked) == 22


@pytest.mark.parametrize("said", [error(400, "no images"), error(500, "oh"), Said(body=b"garbage"), completion("")])
def test_a_server_that_falls_ill_on_the_way_costs_no_item(said: Said) -> None:
    ill = threading.Event()
    with serving(lambda asked: said if ill.is_set() else None) as server:
        captioner = spec_of(server.url, patience=0.3, timeout=0.4, attempts=2).load()
        assert isinstance(captioner, ServerCaptioner) and captioner.caption(ITEMS).captions == ANSWERS
        ill.set()
        with pytest.raises(UserError, match=r"no completion for .* Finished shards are kept"):
            captioner.caption(many(60))
        threading.Timer(0.2, ill.clear).start()
        well = captioner.caption(ITEMS[1:])
    # 400 is final, for a request; all else is doubted.
    assert well.captions == ANSWERS[1:] or said.status == 400


def test_silence_ends_the_job_after_patience_and_the_hang_ends_with_its_time_out() -> None:
    with serving(lambda asked: hang()) as server:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no completion for .* last failure: no answer in 0.2 s"):
            captions(server.url, timeout=0.2, patience=0.5, attempts=20)
    assert time.monotonic() - start < 3


def test_nobody_at_the_address() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(
            UserError, match=r"/v1: no captioning server answers at this address \(.*start it, or correct url"
        ):
            captions(url)


def test_a_server_that_is_started_anew_is_waited_for() -> None:
    with serving() as server:
        captioner = spec_of(server.url).load()
    assert isinstance(captioner, ServerCaptioner)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(captioner.caption, ITEMS)
        time.sleep(0.3)
        with serving(port=server.server_address[1]):
            assert waiting.result(10).captions == ANSWERS


def test_a_server_that_stays_away_ends_the_job() -> None:
    with serving() as server:
        captioner = spec_of(server.url, patience=0.4, timeout=0.2).load()
    assert isinstance(captioner, ServerCaptioner)
    with pytest.raises(UserError, match=r"no completion for .*cannot connect.*Finished shards are kept"):
        captioner.caption(ITEMS)
