"""Thoughts of a model: the text that it generates before its answer, between markers that depend on the model."""

import re
from typing import Any, NamedTuple

MARKERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    (
        "\N{WHITE LEFT-POINTING TRIANGLE}think\N{WHITE RIGHT-POINTING TRIANGLE}",
        "\N{WHITE LEFT-POINTING TRIANGLE}/think\N{WHITE RIGHT-POINTING TRIANGLE}",
    ),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>", "<channel|>"),
)
"""Opening and closing markers of thoughts of known models."""

_OPENING = frozenset(opening.lower() for opening, _ in MARKERS)
# Gemma writes the channel's name after the marker.
_OPEN_END = re.compile(
    "(?:" + "|".join(re.escape(opening) for opening, _ in MARKERS) + r")\s*(?:thought)?\s*\Z", re.IGNORECASE
)
_ANY = re.compile("|".join(re.escape(marker) for pair in MARKERS for marker in pair), re.IGNORECASE)
# Some models that think put the answer into a frame.
_FRAME = re.compile(r"</?answer>|<\|(?:begin|end)_of_box\|>|<\|(?:START|END)_RESPONSE\|>")


class Parts(NamedTuple):
    """A generated text, divided.

    Attributes:
        answer: the text outside of thoughts.
        thought: whether there was a thought.
        unfinished: whether the text ends inside a thought.
        opened_before: whether the first thought began before the text.
    """

    answer: str
    thought: bool
    unfinished: bool
    opened_before: bool


def split_thoughts(text: str, inside: bool = False) -> Parts:
    """Divide a generated text into thoughts and answer.

    A closing marker without an opening one ends a thought that began before the text: in the prompt.

    Args:
        text: the generated text, with markers.
        inside: whether the text begins inside a thought.
    """
    answer: list[str] = []
    start, thought, opened_before = 0, inside, inside
    for marker in _ANY.finditer(text):
        if not inside:
            answer.append(text[start : marker.start()])
        if marker[0].lower() in _OPENING:
            inside = True
        else:
            if not inside:
                answer.clear()
                opened_before |= not thought
            inside = False
        thought, start = True, marker.end()
    if not inside:
        answer.append(text[start:])
    found = " ".join(answer)
    return Parts(_FRAME.sub(" ", found) if thought else found, thought, inside, opened_before)


def ends_inside_thought(prompt: str) -> bool:
    """Return whether a rendered prompt ends with the opening marker of a thought, so that the answer begins inside it."""
    return _OPEN_END.search(prompt) is not None


class MarkerTokens:
    """Markers of thoughts that are control tokens of a tokenizer, which decoding without control tokens would drop."""

    def __init__(self, tokenizer: Any) -> None:
        vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
        named = {vocabulary.get(marker): marker for pair in MARKERS for marker in pair}
        self._tokenizer = tokenizer
        self._markers = {number: marker for number, marker in named.items() if number in special}

    def decode(self, tokens: list[int], text: str) -> str:
        """Return the text of generated tokens with the markers.

        Args:
            tokens: the generated tokens.
            text: their text without control tokens.
        """
        if not self._markers or self._markers.keys().isdisjoint(tokens):
            return text
        found, start = [], 0
        for place, token in enumerate(tokens):
            if token in self._markers:
                found += [self._text(tokens[start:place]), self._markers[token]]
                start = place + 1
        return "".join([*found, self._text(tokens[start:])])

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
