"""Thoughts of captioning models: separated from the caption, and never stored as one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_vlm
from fixtures_extractors import plain

import extractors
from cm3.common.errors import UserError
from extractors.caption.base import Answer
from extractors.caption.thoughts import MARKERS, MarkerTokens, ends_inside_thought, split_thoughts
from extractors.caption.transformers import TransformersCaptioner


@pytest.mark.parametrize(("opening", "closing"), MARKERS)
def test_every_marker_separates_thought_and_caption(opening: str, closing: str) -> None:
    assert Answer.of(f"{opening}hm, red?{closing}\n\na red shoe", 9, False) == Answer("a red shoe", 9)
    assert Answer.of(f"hm, red?{closing} a red shoe", 9, False) == Answer("a red shoe", 9)
    assert Answer.of(f"hm, red?{closing} a red shoe", 9, False, inside=True) == Answer("a red shoe", 9)
    assert Answer.of(f"{opening}\n\n{closing}\n\na red shoe", 9, True) == Answer("a red shoe", 9, cut=True)
    cut = Answer.of(f"{opening}hm, a red", 9, True)
    assert cut.text == "" and "cut at the limit of tokens" in cut.reason and "enable_thinking" in cut.reason
    assert Answer.of("hm, a red", 9, True, inside=True) == cut
    assert Answer.of(f"{opening}hm", 9, False).reason == "the answer is an unfinished thought"
    assert Answer.of(f"{opening}hm{closing} ", 9, False).reason == "the model answered nothing after its thought"
    assert Answer.of(f"{opening}hm{closing}", 9, True) == cut


def test_several_and_nested_thoughts() -> None:
    assert split_thoughts("<think>a <think> b</think> c </think> d").answer.strip() == "d"
    assert split_thoughts("<think>a</think>b<think>c</think>d").answer.split() == ["b", "d"]
    assert Answer.of("a shoe <think>or a boot", 9, True).text == ""
    assert Answer.of("<THINK>a</Think>b", 9, False).text == "b"
    assert Answer.of("<think>a</think><answer>b</answer>", 9, False).text == "b"
    assert Answer.of("</think>a</think><|begin_of_box|>b<|end_of_box|>", 9, False).text == "b"


@pytest.mark.parametrize("text", ["a red shoe", "a [tag] and a < b > c", "an <answer> to think about", "", " x\n y "])
def test_texts_without_thoughts_stay_as_they_are(text: str) -> None:
    parts = split_thoughts(text)
    assert parts == (text, False, False, False)
    assert Answer.of(text, 3, True) == Answer(" ".join(text.split()), 3, cut=True)


def test_prompts_that_open_a_thought() -> None:
    for opening, closing in MARKERS:
        assert ends_inside_thought(f"<|im_start|>assistant\n{opening}\n")
        assert ends_inside_thought(f"assistant\n{opening}thought\n")
        assert not ends_inside_thought(f"<|im_start|>assistant\n{opening}\n\n{closing}\n\n")
        assert not ends_inside_thought(f"what does {opening} mean?<|im_end|>\n<|im_start|>assistant\n")


def test_markers_that_are_control_tokens_are_kept() -> None:
    words = {1: "hm", 2: " red", 3: "[THINK]", 4: "[/THINK]", 5: "</s>"}

    def decode(tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(words[token] for token in tokens if token < 3)

    tokenizer = SimpleNamespace(
        get_vocab=lambda: {word: number for number, word in words.items()}, all_special_ids=[3, 4, 5], decode=decode
    )
    markers = MarkerTokens(tokenizer)
    assert markers.decode([3, 1, 4, 2, 5], "hm red") == "[THINK]hm[/THINK] red"
    assert markers.decode([2, 5], "as it was") == "as it was"


OPENED = "<|im_start|>assistant\n<think>\n"
THINKING = tiny_vlm.TEMPLATE.replace(
    "<|im_start|>assistant\n",
    OPENED + "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}",
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.save_fitted(tmp_path_factory.mktemp("vlm"))


def with_template(vlm: Path, folder: Path, template: str) -> Path:
    folder.mkdir()
    for file in vlm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


def load(folder: Path, **more: Any) -> TransformersCaptioner:
    settings = {"modality": "caption", "backend": "transformers-caption", "weights": str(folder), "encoder": "text"}
    captioner = extractors.parse_extractor(
        "tiny", settings | {"device": "cpu", "precision": "float32", "max_new_tokens": 8} | more, "extractors.tiny"
    ).load()
    assert isinstance(captioner, TransformersCaptioner)
    return captioner


def test_a_template_that_opens_the_thought(vlm: Path, tmp_path: Path) -> None:
    """The model never closes it, as one would that is cut."""
    folder = with_template(vlm, tmp_path / "thinking", THINKING)
    result = load(folder).caption([{"image": plain("red")}, {"image": plain("blue")}])
    assert result.captions == ["", ""] and result.status.tolist() == ["failed"] * 2
    assert "unfinished thought" in result.errors[0] or "thought was cut" in result.errors[0]
    answered = load(folder, chat_template_kwargs={"enable_thinking": False}).caption([{"image": plain("red")}])
    assert answered.status.tolist() == ["ok"] and answered.captions[0]


def test_template_variables_and_system_prompt_reach_the_model(vlm: Path) -> None:
    captioner = load(vlm, system_prompt="You are brief.")
    batches: list[Any] = []
    generate = captioner.model.generate
    captioner.model.generate = lambda **batch: (batches.append(batch["input_ids"]), generate(**batch))[1]
    captioner.caption([{"image": plain("red")}])
    prompt = captioner.processor.tokenizer.decode(batches[0][0])
    assert prompt.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n")
    assert captioner.facts()["system_prompt"] == "You are brief."
    with pytest.raises(UserError, match="its chat template has no variable 'enable_thinkin'"):
        load(vlm, chat_template_kwargs={"enable_thinkin": False})


def test_new_settings_are_part_of_the_key_only_when_set() -> None:
    base = {"modality": "caption", "backend": "openai-caption", "url": "http://a", "model": "m", "encoder": "t"}

    def identity(**more: Any) -> dict[str, Any]:
        return extractors.parse_extractor("x", base | more, "extractors.x").identity()

    assert set(identity()) == {
        "modality", "backend", "dtype", "model", "prompt", "field_chars", "max_pixels", "max_new_tokens"
    }  # fmt: skip
    for more in (
        {"system_prompt": "s"},
        {"min_pixels": 900},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"extra_body": {"top_k": 1}},
        {"max_thought_tokens": 100},
    ):
        assert identity(**more) == identity() | more
        json.dumps(identity(**more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"min_pixels": 300_000}, "min_pixels = 300000 exceeds max_pixels = 262144"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize is not a variable of a chat template"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
        ({"extra_body": {"max_tokens": 9}}, "max_tokens is not set here; use max_new_tokens and max_thought_tokens"),
        ({"extra_body": {"messages": []}}, "messages is not set here"),
        ({"extra_body": {"chat_template_kwargs": {}}}, "use chat_template_kwargs of the extractor"),
    ],
)
def test_new_settings_are_checked(more: dict[str, Any], message: str) -> None:
    base = {"modality": "caption", "backend": "openai-caption", "url": "http://a", "model": "m", "encoder": "t"}
    with pytest.raises(UserError) as refused:
        extractors.parse_extractor("x", base | more, "extractors.x")
    assert message in str(refused.value)
