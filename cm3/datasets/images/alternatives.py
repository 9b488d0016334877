"""Further addresses of product images: the same path on the other image hosts of Amazon, with and without a size code."""

import re
from collections.abc import Sequence
from typing import Any

from yarl import URL

from cm3.common.ssrf import RefusedError, is_allowed, parse_url

AMAZON_HOSTS = (
    "ecx.images-amazon.com",
    "g-ecx.images-amazon.com",
    "images-cn.ssl-images-amazon.com",
    "images-eu.ssl-images-amazon.com",
    "images-fe.ssl-images-amazon.com",
    "images-jp.amazon.com",
    "images-jp.ssl-images-amazon.com",
    "images-na.ssl-images-amazon.com",
    "images.amazon.com",
    "m.media-amazon.com",
    "z-ecx.images-amazon.com",
)
"""Hosts of Amazon's product images, of 2014 until today."""

_ROOTS = ("https://images-na.ssl-images-amazon.com", "https://m.media-amazon.com")
_ABSENT = (400, 403)
# Of an item with eight images, the addresses of two are enough; each failed address costs a request.
_REFERENCES = 2
# Requested size in the last part of a path, such as ._SX300_ or ._AC_SL1500_, before the suffix.
_SIZE_CODE = re.compile(r"\._[^/]*_(\.[A-Za-z]+)$")


def alternatives_of(hosts: Sequence[str]) -> dict[str, Any] | None:
    """Return the `alternatives` of an images_spec() for an allow-list of hosts; None if it allows no host of Amazon's.

    Returns:
        hosts: hosts whose paths are tried at `roots`, too; roots: the allowed base URLs to try; absent: HTTP statuses by
        which these hosts say that there is no image.
    """
    allowed = [host for host in AMAZON_HOSTS if is_allowed(host, list(hosts))]
    if not allowed:
        return None
    roots = [root for root in _ROOTS if root.partition("://")[2] in allowed]
    return {"hosts": allowed, "roots": roots, "absent": list(_ABSENT)}


def with_alternatives(references: Sequence[str], spec: dict[str, Any]) -> list[str]:
    """Return the addresses of an item's image and, after them, further ones as the `alternatives` of an images_spec() say."""
    alternatives = spec.get("alternatives")
    if not alternatives:
        return list(references)
    further: list[str] = []
    taken = 0
    for reference in references:
        url = _parsed(reference)
        if url is None or (url.host or "").lower() not in alternatives["hosts"]:
            continue
        roots = [str(url.origin()), *alternatives["roots"]]
        further += [root + path for path in _paths(url) for root in roots]
        taken += 1
        if taken == _REFERENCES:
            break
    return list(dict.fromkeys([*references, *further]))


def absent_statuses(spec: dict[str, Any], host: str) -> frozenset[int]:
    """Return the HTTP statuses, besides 404 and 410, by which a host says that there is no image."""
    alternatives = spec.get("alternatives") or {}
    return frozenset(alternatives["absent"]) if host in alternatives.get("hosts", ()) else frozenset()


def _paths(url: URL) -> list[str]:
    path = url.raw_path_qs
    return list(dict.fromkeys([path, _SIZE_CODE.sub(r"\1", path)]))


def _parsed(text: str) -> URL | None:
    try:
        return parse_url(text)
    except RefusedError:
        return None
