"""Cleaning of shop texts, which are strangers' HTML."""

import html
import re

# What is never closed reaches to the end, as in a browser; it also keeps the search linear in the text's length.
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
# A letter must follow the bracket, so that "< 10 cm and > 5 cm" survives.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Half a tag at the end of a text, as of a page that was cut: `<span class="a-size-medium"`; and at its start: `" />`.
_CUT_TAG = re.compile(r"</?[a-zA-Z][\w-]*\s[^<>]*=[^<>]*\Z|\A[^<>]*\"\s*/>")
# What shop pages left in titles instead of a title.
_SCRIPT = re.compile(r"\bvar aPageStart\b.*|\(new Date\(\)\)\.getTime\(\).*", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
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
