"""Failures of a captioning server: those that pass, those that fail one item, and those that end the job."""

import itertools
import re
import socket
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
    Clock,
    Said,
    at_once,
    captions,
    completion,
    error,
    hang,
    many,
    once,
    serving,
    short_pauses,
    spec_of,
)
from fixtures_extractors import plain

from cm3.common.errors import UserError
from extractors.caption import openai_retry
from extractors.caption.base import PROMPT
from extractors.caption.openai import ServerCaptioner

__all__ = ["short_pauses"]  # used by every test here


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
def test_a_failure_that_passes_leaves_no_trace(said: Any) -> None:
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
        (Said(500, b"\x1b[31m\xff " * 500), r"HTTP 500 \(\?\[31m"),
    ],
)
def test_a_lasting_failure_fails_one_item_only(said: Any, reason: str) -> None:
    with serving(lambda asked: said if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url)
    assert result.captions == [*ANSWERS[:4], "", *ANSWERS[5:]] and result.status[4] == "failed"
    assert set(result.errors) == {4}
    assert re.search(reason, result.errors[4]), result.errors[4]
    assert len(result.errors[4]) < 300


def test_no_answer_in_time_fails_one_item_only() -> None:
    with serving(lambda asked: hang() if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url, timeout=2.0, attempts=1)
    assert result.captions == [*ANSWERS[:4], "", *ANSWERS[5:]] and result.status.tolist().count("failed") == 1
    assert result.errors == {4: "no answer in 2 s, 2 times"}


def test_retry_after_makes_all_requests_wait() -> None:
    times: list[float] = []
    together = at_once(2)

    def failure(asked: Asked) -> Said | None:
        times.append(time.monotonic())
        together(asked)
        if asked.number > 2:
            time.sleep(0.1)  # in which the refusal is read, so that the other worker sends few more
        return error(429, "slow down", ("Retry-After", "2")) if asked.number == 2 else None

    with serving(failure) as server:
        result = captions(server.url, concurrency=2)
    assert result.captions == ANSWERS and server.peak == 2 and len(times) == 13
    pause = int((np.diff(sorted(times)) > 1).argmax())
    assert 2 <= pause <= 8, times


def test_endless_429_for_one_item_fails_that_item_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retry, "SHARED_WAITS", 2)
    monkeypatch.setattr(openai_retry, "MOST_WAITS", 6)
    refuse = error(429, "request too large")
    with serving(lambda asked: refuse if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url)
    assert result.errors == {4: "HTTP 429 (request too large), 8 times"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), r"HTTP 401, the key in .* MY_KEY is refused \(.*\*\*\*\)"),
        (error(403, "no"), r"HTTP 403 \(no\), the key lacks permission"),
        (
            error(404, "The model `colour-teller` does not exist."),
            "HTTP 404 .*does not exist.*unknown model or address",
        ),
        (error(429, "you ran out", code="insufficient_quota"), "HTTP 429 .*the quota is used up"),
        (error(429, "later", ("Retry-After", "3600")), "asks for a pause of 3600 s"),
        (Said(302, b"", (("Location", "http://example.org/"),)), "HTTP 302, a redirect"),
    ],
)
def test_fatal_answers_end_the_job_at_once(said: Said, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda asked: said) as server, pytest.raises(UserError, match=message) as stopped:
        captions(server.url, api_key_env="MY_KEY")
    assert server.url in str(stopped.value) and KEY not in str(stopped.value)
    assert "Finished shards are kept" in str(stopped.value) or "401" in message
    assert len(server.asked) <= 8


@pytest.mark.parametrize(
    "said", [error(500, "oh"), Said(body=b"garbage"), completion(""), error(400, "no images, please")]
)
def test_twenty_failures_at_the_start_end_the_job(said: Said) -> None:
    items = [{"title": str(n), "image": plain("red", (8, 8))} for n in range(60)]
    with serving(lambda asked: said) as server, pytest.raises(UserError, match="the first 20 requests got no caption"):
        captions(server.url, items, attempts=2)
    assert len(server.asked) < 60


@pytest.mark.parametrize(
    "said", [error(500, "oh"), Said(body=b"garbage"), completion(""), error(400, "no images, please")]
)
def test_a_broken_server_ends_a_job_of_few_items_too(said: Said) -> None:
    message = "3 requests got no caption, and neither did one for a plain white image: .*Finished shards are kept"
    with serving(lambda asked: said) as server, pytest.raises(UserError, match=message):
        captions(server.url, many(3), attempts=2)
    assert server.asked[-1].colour == "white" and server.asked[-1].prompt == PROMPT


def test_rejected_items_fail_if_a_white_image_is_answered() -> None:
    with serving(lambda asked: None if asked.colour == "white" else error(400, "unsafe")) as server:
        result = captions(server.url, many(3))
    assert result.status.tolist() == ["failed"] * 3 and result.errors[0] == "HTTP 400 (unsafe)"


@pytest.mark.parametrize("said", [error(400, "unsafe"), error(500, "CUDA error")])
def test_any_number_of_rejected_images_fails_alone(said: Said) -> None:
    with serving(lambda asked: None if asked.prompt.startswith("0 ") else said) as server:
        result = captions(server.url, many(50), concurrency=1, attempts=1)
    assert result.status.tolist() == ["ok"] + ["failed"] * 49


def test_failures_before_the_first_answer_are_retried() -> None:
    with serving(lambda asked: error(500, "warming up") if asked.number < 10 else None) as server:
        result = captions(server.url, many(12), concurrency=2, attempts=1)
    assert result.status.tolist() == ["ok"] * 12 and len(server.asked) == 22


@pytest.mark.parametrize("said", [error(400, "no images"), error(500, "oh"), Said(body=b"garbage"), completion("")])
def test_a_server_that_breaks_during_the_job_costs_no_item(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, failures = Clock(), iter(())
    monkeypatch.setattr(openai_retry, "time", clock)
    with serving(lambda asked: next(failures, None)) as server:
        captioner = spec_of(server.url, attempts=2).load()
        assert isinstance(captioner, ServerCaptioner) and captioner.caption(ITEMS).captions == ANSWERS
        failures, clock.step = itertools.repeat(said), 10.0
        with pytest.raises(UserError, match=r"no completion for .* Finished shards are kept"):
            captioner.caption(many(60))
        failures, clock.step = iter([said] * 15), 0.0
        repaired = captioner.caption(ITEMS[1:])
    # 400 is final for a request; other failures are checked against the last answered request.
    assert repaired.captions == ANSWERS[1:] or said.status == 400


def test_patience_and_timeout_end_a_job_without_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retry, "time", Clock(10.0))
    with serving(lambda asked: hang()) as server:
        with pytest.raises(UserError, match=r"no completion for .* last failure: no answer in 1 s"):
            captions(server.url, timeout=1.0, patience=20.0, attempts=20)
        assert not server.closing.is_set() and len(server.asked) < 8 * 20


def test_a_dripping_answer_ends_with_its_timeout() -> None:
    with serving(lambda asked: Said(body=b" " * 6000, drip=0.05) if asked.number == 3 else None) as server:
        start = time.monotonic()
        assert captions(server.url, timeout=2.0).captions == ANSWERS
        seconds = time.monotonic() - start
    dripped = server.asked[3].prompt
    assert seconds < 150 and [asked.prompt for asked in server.asked].count(dripped) >= 2, "it takes 300 s"


@pytest.mark.parametrize(("status", "header"), [(429, "false"), (400, "true")])
def test_headers_for_the_openai_package_change_no_rule(status: int, header: str) -> None:
    answer = error(status, "no", ("x-should-retry", header))
    with serving(lambda asked: answer if asked.number == 3 else None) as server:
        result = captions(server.url, concurrency=1)
    assert result.captions == [*ANSWERS[:3], ANSWERS[3] if status == 429 else "", *ANSWERS[4:]]


def test_no_server_at_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            UserError, match=r"/v1: no captioning server answers at this address \(.*start it, or correct url"
        ):
            captions(url)


def test_a_restarting_server_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        captioner = spec_of(server.url).load()
    assert isinstance(captioner, ServerCaptioner)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(captioner.caption, ITEMS)
        while "cannot connect" not in caplog.text and not waiting.done():
            time.sleep(0.02)
        with serving(port=server.server_address[1]):
            assert waiting.result(120).captions == ANSWERS


def test_a_server_that_stays_down_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retry, "time", Clock(10.0))
    with serving() as server:
        captioner = spec_of(server.url).load()
    assert isinstance(captioner, ServerCaptioner)
    with pytest.raises(UserError, match=r"no completion for .*cannot connect.*Finished shards are kept"):
        captioner.caption(ITEMS)
