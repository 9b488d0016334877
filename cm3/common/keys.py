"""Content keys: equal settings give equal keys, whatever the order of their keys in a file."""

import hashlib
import json
from typing import Any

KEY_LENGTH = 12


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys, no spaces and full float precision.

    Raises:
        ValueError: a float is NaN or infinite, which JSON cannot hold.
        TypeError: a value is not a JSON type.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(value: Any) -> str:
    """Return the first 12 hex digits of sha256 over `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:KEY_LENGTH]
