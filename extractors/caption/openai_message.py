"""Message of a chat completion: its text, and whether the server reports thoughts with it."""

from collections.abc import Mapping
from typing import Any

_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details")
"""Fields of a message in which servers report the thoughts."""


def text_of(content: Any) -> str:
    """Return the text of a message's content: a text, or a list of parts, whose texts are joined; else an empty text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (
        part for part in content if isinstance(part, Mapping) and part.get("type", "text") in ("text", "output_text")
    )
    return "".join(text for text in (part.get("text") for part in parts) if isinstance(text, str))


def has_thought(message: Mapping[str, Any]) -> bool:
    """Return whether a message has thoughts in a field or in a part of their own."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return any(bool(message.get(name)) for name in _THOUGHTS) or any(
        part.get("type") in ("thinking", "reasoning") for part in parts
    )
