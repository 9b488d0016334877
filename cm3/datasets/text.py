"""Plain text from untrusted HTML of shop pages."""

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

# An element that is not closed extends to the end, as in a browser; this also keeps the search linear.
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
# A letter must follow the bracket, so that "< 10 cm and > 5 cm" is kept.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Truncated tags: `<span class="a-size-medium"` at the end of a text, `" />` at its start.
_CUT_TAG = re.compile(r"</?[a-zA-Z][\w-]*\s[^<>=]*=[^<>]*\Z|\A[^<>]*\"\s*/>")
# Scripts that some records have in place of a title.
_SCRIPT = re.compile(r"\bvar aPageStart\b.*|\(new Date\(\)\)\.getTime\(\).*", re.DOTALL)
# Including lone surrogates, which JSON can express and UTF-8 cannot.
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
    """Return whether `text` can be encoded as UTF-8: it has no lone surrogate such as \\ud83d."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_urls(texts: Iterable[str]) -> list[str]:
    """Return `texts` without those that cannot be encoded as UTF-8."""
    return [text for text in texts if is_unicode(text)]


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values of nested lists in order. Not recursive, as untrusted data may be nested deeply."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += reversed(value)
        else:
            yield value
