"""Parameters of a chat completion request that some servers refuse: the request is adapted to what they accept."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import openai

log = logging.getLogger(__name__)

REPLACEMENTS: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
"""Parameters that a request can do without, each with the one that replaces it."""

_CODES = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter", "invalid_parameter"})
_REFUSAL = re.compile(
    r"support|unknown|unrecogni[sz]ed|unexpected|unused|extra|not (?:permitted|allowed|valid|accepted)|deprecated|invalid|only",
    re.IGNORECASE,
)
# A refusal of this one request, which is too long, and not of the parameter.
_TOO_LONG = re.compile(r"too (?:large|long|many)|context (?:length|window)|maximum (?:context|model)", re.IGNORECASE)


class ParameterNames:
    """Parameters that a server has refused so far.

    Attributes:
        refused: their names.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.refused: set[str] = set()

    def adapted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request without the refused parameters, with those that replace them."""
        body = dict(request)
        for name in self.refused & body.keys():
            value, other = body.pop(name), REPLACEMENTS[name]
            if other is not None:
                body.setdefault(other, value)
        return body

    def refused_by(self, error: openai.APIStatusError, body: Mapping[str, Any]) -> bool:
        """Return whether a server refuses a parameter of a request that it can do without; remember the parameter."""
        name = _named_in(error, body)
        if name is None:
            return False
        if name not in self.refused:
            other = REPLACEMENTS[name]
            log.warning(
                "%s: refuses the parameter %s; requests are sent with%s from now on",
                self._url,
                name,
                f" {other} instead" if other else "out it",
            )
            self.refused.add(name)
        return True


def _named_in(error: openai.APIStatusError, body: Mapping[str, Any]) -> str | None:
    if error.status_code not in (400, 422):
        return None
    details = error.body if isinstance(error.body, dict) else {}
    parameter, code, text = details.get("param"), details.get("code"), error.response.text
    known = [name for name in REPLACEMENTS if name in body]
    if code in _CODES and parameter in known:
        return str(parameter)
    if _TOO_LONG.search(text) or not _REFUSAL.search(text):
        return None
    named = [(found.start(), name) for name in known if (found := re.search(rf"\b{name}\b", text))]
    return min(named)[1] if named else None
