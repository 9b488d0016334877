"""Captions from an OpenAI-compatible server: requests, results and settings."""

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from caption_server import (
    ANSWERS,
    ITEMS,
    KEY,
    MODEL,
    Asked,
    Failure,
    at_once,
    captions,
    completion,
    error,
    serving,
    short_pauses,
    spec_of,
)
from fixtures_extractors import plain
from repository import ROOT

from cm3.common.errors import UserError
from cm3.common.keys import key_of

__all__ = ["short_pauses"]  # used by every test here


def test_captions_are_in_order_and_concurrency_is_bounded() -> None:
    for concurrency in (1, 4, 8):
        together = at_once(concurrency)

        def answer_out_of_order(asked: Asked, together: Failure = together) -> None:
            together(asked)
            time.sleep(0.02 * (asked.number * 7 % 5))

        with serving(answer_out_of_order) as server:
            result = captions(server.url, concurrency=concurrency)
        assert result.captions == ANSWERS and result.status.tolist() == ["ok"] * 12 and not result.errors
        assert result.tokens.tolist() == [4] * 12 and result.counts == {"captions_cut": 0}
        assert server.peak == concurrency


def test_requests_are_greedy_and_without_control_tokens() -> None:
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


def test_undecodable_images_are_failed_and_not_sent() -> None:
    with serving() as server:
        result = captions(server.url, [{"image": b""}, ITEMS[0], {"image": b"text"}, {}])
    assert result.status.tolist() == ["failed", "ok", "failed", "missing"] and result.errors[0] == "0 bytes"
    assert len(server.asked) == 1


def test_truncated_captions_are_counted_and_tokens_may_be_0() -> None:
    with serving(lambda asked: completion("a very long", end="length", usage=None)) as server:
        result = captions(server.url)
    assert result.counts == {"captions_cut": 12} and result.tokens.tolist() == [0] * 12


def test_a_missing_key_names_the_variable() -> None:
    with serving(models=error(401, "no key")) as server, pytest.raises(UserError, match="OPENAI_API_KEY holds none"):
        captions(server.url)


def test_a_model_that_is_not_listed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        captions(server.url, model="other")
    assert f"lists {MODEL}, not other" in caplog.text


def test_nothing_else_is_sent_in_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai package adds the platform, and headers from variables that may belong to another service."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-service")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-another-service")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Other: {KEY}\nAuthorization: Bearer other")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MY_KEY", "sk-mine-0123456789")
    with serving() as server:
        captions(server.url, api_key_env="MY_KEY")
        captions(server.url, api_key_env="UNSET_KEY")
    allowed = {"host", "accept", "connection", "content-type", "content-length", "user-agent"}
    sent = [{name.lower(): value for name, value in asked.headers.items()} for asked in server.asked]
    assert all(headers.pop("authorization") == "Bearer sk-mine-0123456789" for headers in sent[:12])
    assert set().union(*sent) == allowed and len(sent) == 24


def test_a_proxy_is_used_for_other_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as proxy, serving() as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert captions("http://captions.example/v1").captions == ANSWERS
        assert {asked.headers["Host"] for asked in proxy.asked} == {"captions.example"}
        assert captions(server.url).captions == ANSWERS
        monkeypatch.setenv("no_proxy", "captions.example")
        with pytest.raises(UserError, match="no captioning server answers"):
            captions("http://captions.example/v1", attempts=1, timeout=5.0)
    assert len(proxy.asked) == len(server.asked) == 12


def test_requests_are_not_logged_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, caplog.at_level("INFO"):
        captions(server.url)
    assert not caplog.records


def test_the_openai_package_is_imported_by_the_job_only() -> None:
    code = "import sys, extractors.caption.openai; print({'openai', 'httpx2'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_works_inside_a_running_event_loop() -> None:
    import asyncio

    async def cell() -> Any:
        return captions(server.url).captions

    with serving() as server:
        assert asyncio.run(cell()) == ANSWERS


@pytest.mark.parametrize(
    ("data", "message"),
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
        ({"prompt": "{name}"}, "{name} is not a field of an item"),
    ],
)
def test_settings_are_checked(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        spec_of(**({"url": "http://a/v1"} | data))
    assert message in str(refused.value) and KEY not in str(refused.value)


def test_the_key_covers_the_model_and_not_the_address() -> None:
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
