"""Servers that think, that refuse usual parameters, or that answer in parts."""

from typing import Any

import pytest
from caption_server import ANSWERS, ITEMS, Asked, Said, captions, completion, error, serving, short_pauses, spec_of

from extractors.caption.openai import ServerCaptioner

__all__ = ["short_pauses"]  # used by every test here


def message(text: Any, end: str = "stop", **fields: Any) -> Said:
    """A completion whose message has further fields."""
    return completion(
        None,
        choices=[{"index": 0, "finish_reason": end, "message": {"role": "assistant", "content": text, **fields}}],
    )


@pytest.mark.parametrize(
    "said",
    [
        completion("<think>hm, a blue one?</think>\n\na fine thing"),
        completion("hm, a blue one?</think>\n\na fine thing"),
        message("a fine thing", reasoning_content="hm, a blue one?"),
        message("a fine thing", reasoning="hm, a blue one?"),
        message([{"type": "text", "text": "a fine "}, {"type": "text", "text": "thing"}]),
        message(
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm, a blue one?"}]},
                {"type": "text", "text": "a fine thing"},
            ]
        ),
    ],
)
def test_only_the_answer_is_the_caption(said: Said) -> None:
    with serving(lambda asked: said) as server:
        result = captions(server.url)
    assert set(result.captions) == {"a fine thing"} and result.status.tolist() == ["ok"] * 12
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (completion("<think>hm, a blue", end="length"), "the thought was cut at the limit of tokens"),
        (message(None, end="length", reasoning_content="hm, a blue"), "the thought was cut at the limit of tokens"),
        (message("", end="length", reasoning="hm, a blue"), "the thought was cut at the limit of tokens"),
        (message([{"type": "thinking", "thinking": "hm"}], end="length"), "the thought was cut at the limit"),
        (message(None, reasoning_content="hm"), "the model answered nothing after its thought"),
        (completion("<think>hm, a blue"), "the answer is an unfinished thought"),
    ],
)
def test_unfinished_thoughts_are_failed_with_their_reason(said: Said, reason: str) -> None:
    with serving(lambda asked: said if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url)
    assert result.captions == [*ANSWERS[:4], "", *ANSWERS[5:]] and result.status[4] == "failed"
    assert list(result.errors) == [4] and result.errors[4].startswith(reason)
    assert len(server.asked) == 12 and result.counts == {"captions_cut": 0}


def test_a_cut_thought_without_markers_is_found_by_a_longer_answer() -> None:
    def thinking(asked: Asked) -> Said:
        if asked.request["max_tokens"] < 1000:
            return completion("Okay, the user wants a", end="length")
        return completion("Okay, the user wants a caption.</think>a red thing")

    with serving(thinking) as server:
        result = captions(server.url)
    assert result.status.tolist() == ["failed"] * 12 and "thought was cut" in result.errors[0]
    assert len(server.asked) == 13  # one longer answer is asked for, once


def test_a_cut_caption_stays_a_caption() -> None:
    def wordy(asked: Asked) -> Said:
        return completion("a very long caption of a", end="length")

    with serving(wordy) as server:
        result = captions(server.url)
    assert result.status.tolist() == ["ok"] * 12 and result.counts == {"captions_cut": 12}
    assert len(server.asked) == 13


def refusing(*names: str, style: str = "openai") -> Any:
    """A server that accepts none of the named parameters."""

    def refuse(asked: Asked) -> Said | None:
        for name in names:
            if name not in asked.request:
                continue
            if style == "openai":
                text = f"Unsupported parameter: '{name}' is not supported with this model. Use another one instead."
                return error(400, text, param=name, code="unsupported_parameter")
            if style == "value":
                text = f"'{name}' does not support 0 with this model. Only the default (1) value is supported."
                return error(400, text)
            return Said(
                422, b'{"detail":[{"loc":["body","%s"],"msg":"Extra inputs are not permitted"}]}' % name.encode()
            )
        return None

    return refuse


@pytest.mark.parametrize("style", ["openai", "value", "fields"])
def test_refused_parameters_are_left_out_for_the_whole_run(style: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(refusing("max_tokens", "temperature", "seed", style=style)) as server:
        captioner = spec_of(server.url, concurrency=1).load()
        assert isinstance(captioner, ServerCaptioner)
        assert captioner.caption(ITEMS).captions == ANSWERS
        assert len(server.asked) == 12 + 3
        assert captioner.caption(ITEMS[:2]).captions == ANSWERS[:2]
    assert len(server.asked) == 12 + 3 + 2
    last = server.asked[-1].request
    assert last["max_completion_tokens"] == 64 and not {"max_tokens", "temperature", "seed"} & set(last)
    assert captioner.facts()["decoding"] == {
        "strategy": "the server's own",
        "max_new_tokens": 64,
        "refused_parameters": ["max_tokens", "seed", "temperature"],
    }
    assert caplog.text.count("refuses the parameter") == 3
    assert "refuses the parameter max_tokens; requests are sent with max_completion_tokens instead" in caplog.text


def test_parallel_requests_adapt_together() -> None:
    with serving(refusing("max_tokens", "temperature"), delay=0.02) as server:
        assert captions(server.url, concurrency=8).captions == ANSWERS
    assert len(server.asked) <= 12 + 2 * 8


@pytest.mark.parametrize(
    "text",
    [
        "'max_tokens' is too large: 64. This model's maximum context length is 4096 tokens",
        "context length is 4096",
        "the image is invalid",
        "unsupported image",
    ],
)
def test_other_refusals_fail_their_item_and_change_nothing(text: str) -> None:
    with serving(lambda asked: error(400, text) if asked.prompt.startswith("thing 4 ") else None) as server:
        # One request at a time: what is refused before the server's first answer is asked twice.
        result = captions(server.url, concurrency=1)
    assert list(result.errors) == [4] and text in result.errors[4]
    assert len(server.asked) == 12 and all("max_tokens" in asked.request for asked in server.asked)


def test_a_parameter_without_a_replacement_that_is_accepted_fails() -> None:
    refuse = refusing("max_tokens", "max_completion_tokens")
    with serving(lambda asked: refuse(asked) if asked.prompt.startswith("thing 4 ") else None) as server:
        result = captions(server.url)
    assert list(result.errors) == [4] and "max_completion_tokens" in result.errors[4]


def test_settings_are_sent_with_each_request() -> None:
    more: dict[str, Any] = {
        "system_prompt": "You are brief.",
        "chat_template_kwargs": {"enable_thinking": False},
        "extra_body": {"top_k": 1, "temperature": 0.5},
        "max_thought_tokens": 100,
        "min_pixels": 2000,
    }
    with serving() as server:
        captioner = spec_of(server.url, **more).load()
        assert isinstance(captioner, ServerCaptioner)
        assert captioner.caption(ITEMS).captions == ANSWERS
    request = server.asked[0].request
    assert request["messages"][0] == {"role": "system", "content": "You are brief."}
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert (request["top_k"], request["temperature"], request["max_tokens"]) == (1, 0.5, 164)
    assert {asked.size[0] * asked.size[1] >= 2000 for asked in server.asked} == {True}
    facts = captioner.facts()
    assert facts["extra_body"] == more["extra_body"] and facts["preprocessing"]["min_pixels"] == 2000
    assert facts["decoding"]["max_thought_tokens"] == 100
