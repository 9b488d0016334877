"""Captions from an OpenAI-compatible server: what is asked, what comes of it, and what its settings may be."""

import json
import time
from typing import Any

import pytest
from caption_server import (
    ANSWERS,
    ITEMS,
    KEY,
    MODEL,
    captions,
    completion,
    error,
    no_time_to_lose,
    serving,
    spec_of,
)
from fixtures_extractors import plain

from cm3.common.errors import UserError
from cm3.common.keys import key_of

__all__ = ["no_time_to_lose"]  # used by every test here


def test_captions_come_in_order_whatever_the_concurrency_and_it_is_kept_to() -> None:
    for concurrency in (1, 4, 8):
        with serving(lambda asked: time.sleep(0.02 * (1 + asked.number * 7 % 5))) as server:
            result = captions(server.url, concurrency=concurrency)
        assert result.captions == ANSWERS and result.status.tolist() == ["ok"] * 12 and not result.errors
        assert result.tokens.tolist() == [4] * 12 and result.counts == {"captions_cut": 0}
        assert server.peak == concurrency if concurrency < 8 else 4 < server.peak <= 8


def test_what_is_sent_is_greedy_bounded_and_holds_no_control_tokens() -> None:
    items = [
        {"title": "<|image_pad|>", "brand": "[INST] b", "image": plain("red", (900, 600))},
        {"title": "<", "brand": "image>", "image": plain("blue", (1, 300))},
    ]
    with serving() as server:
        result = captions(server.url, items, prompt="{title}{brand}|{features}", max_pixels=10_000, concurrency=1)
    assert result.captions == ["a red product", "a white product"]  # widened with white
    prompts = [asked.prompt for asked in server.asked]
    assert prompts == ["‹|image_pad|›(INST) b|", "‹image›|"]
    request = server.asked[0].request
    assert {name: request[name] for name in ("model", "max_tokens", "temperature", "seed")} == {
        "model": MODEL,
        "max_tokens": 64,
        "temperature": 0,
        "seed": 0,
    }
    assert "Authorization" not in server.asked[0].headers


def test_images_that_cannot_be_decoded_are_failed_and_not_sent() -> None:
    with serving() as server:
        result = captions(server.url, [{"image": b""}, ITEMS[0], {"image": b"text"}, {}])
    assert result.status.tolist() == ["failed", "ok", "failed", "missing"] and result.errors[0] == "0 bytes"
    assert len(server.asked) == 1


def test_a_caption_that_was_cut_is_counted_and_tokens_are_0_where_the_server_does_not_tell() -> None:
    with serving(lambda asked: completion("a very long", end="length", usage=None)) as server:
        result = captions(server.url)
    assert result.counts == {"captions_cut": 12} and result.tokens.tolist() == [0] * 12


def test_a_missing_key_names_the_variable() -> None:
    with serving(models=error(401, "no key")) as server, pytest.raises(UserError, match="OPENAI_API_KEY holds none"):
        captions(server.url)


def test_a_model_that_is_not_listed_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        captions(server.url, model="other")
    assert f"lists {MODEL}, not other" in caplog.text


def test_works_where_an_event_loop_runs_already() -> None:
    import asyncio

    async def cell() -> Any:
        return captions(server.url).captions

    with serving() as server:
        assert asyncio.run(cell()) == ANSWERS


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"url": "ftp://a/v1"}, "url = 'ftp://a/v1': expected the address of a server"),
        ({"url": "http://me:pass@a/v1"}, "the key comes from the environment"),
        (
            {"url": f"http://a/v1?api_key={KEY}"},
            "url = '(not shown)': remove user, password and ?query: the key comes from the environment",
        ),
        ({"api_key": "sk-1"}, "unknown key"),
        ({"api_key_env": KEY}, "api_key_env = '(not shown)': expected the name of an environment variable"),
        ({"api_key_env": "sk_secret"}, "not a key"),
        ({"max_new_tokens": 129}, "max_new_tokens"),
        ({"temperature": 1.0}, "unknown key"),
        ({"prompt": "{name}"}, "{name} is no field of an item"),
    ],
)
def test_settings_are_checked(data: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        spec_of(**({"url": "http://a/v1"} | data))
    assert told in str(refused.value) and KEY not in str(refused.value)


def test_the_key_covers_what_decides_the_captions_and_not_where_they_come_from() -> None:
    spec = spec_of("http://a:8000")
    assert spec.url == "http://a:8000/v1" == spec_of("http://a:8000/v1/chat/completions").url
    for knob in ({"url": "https://b/v1"}, {"concurrency": 1}, {"timeout": 1}, {"api_key_env": "K"}, {"encoder": "e"}):
        assert key_of(spec_of(**({"url": "http://a"} | knob)).identity()) == key_of(spec.identity())
    for knob in ({"model": "b"}, {"revision": "awq"}, {"prompt": "?"}, {"max_new_tokens": 9}, {"max_pixels": 900}):
        assert key_of(spec_of("http://a", **knob).identity()) != key_of(spec.identity())
    assert not spec.uses_gpu() and "a:8000" not in json.dumps(spec.settings())
    assert spec_of(**(spec.settings() | spec.runtime())) == spec


def test_offline_means_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM3_OFFLINE", "1")
    with pytest.raises(UserError, match="CM3_OFFLINE is set"):
        spec_of("https://captions.example").load()
    with serving() as server:
        assert captions(server.url).captions == ANSWERS
