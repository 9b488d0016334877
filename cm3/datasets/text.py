"""Cleaning of shop texts, which are strangers' HTML."""

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

# What is never closed reaches to the end, as in a browser; it also keeps the search linear in the text's length.
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
# A letter must follow the bracket, so that "< 10 cm and > 5 cm" survives.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Half a tag at the end of a text, as of a page that was cut: `<span class="a-size-medium"`; and at its start: `" />`.
_CUT_TAG = re.compile(r"</?[a-zA-Z][\w-]*\s[^<>=]*=[^<>]*\Z|\A[^<>]*\"\s*/>")
# What shop pages left in titles instead of a title.
_SCRIPT = re.compile(r"\bvar aPageStart\b.*|\(new Date\(\)\)\.getTime\(\).*", re.DOTALL)
# Halves of surrogate pairs, too, which JSON can write and no file can hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def plain_text(text: str) -> str:
    """Return `text` with HTML entities resolved, tags and control characters removed and white space folded."""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    if "<" in text or "/>" in text:
        text = _CUT_TAG.sub(" ", text)
    if "getTime" in text or "aPageStart" in text:
        text = _SCRIPT.sub(" ", text)
    return " ".join(_CONTROL.sub(" ", text).split())


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written: not with half of a surrogate pair, as cut off by JSON's \\ud83d."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def addresses(found: Iterable[str]) -> list[str]:
    """Return the addresses of images among `found`, in order; what cannot be written is none."""
    return [text for text in found if is_unicode(text)]


def leaves(value: Any) -> Iterator[Any]:
    """Yield in order what nested lists hold; a stranger's may be nested deeper than a function may call itself."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += reversed(value)
        else:
            yield value
