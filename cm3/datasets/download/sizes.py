"""Sizes of published files, by HEAD requests to their mirrors, for the forecast of a run."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cm3.common.errors import UserError
from cm3.common.http import FetchError, TransientError
from cm3.datasets.download.client import MirrorClient

LONGEST_SECONDS = 4.0
"""Limit for all requests together."""


def published_sizes(files: Sequence[Mapping[str, Any]], seconds: float = LONGEST_SECONDS) -> list[int | None]:
    """Return the size of each file in bytes, None where it is unknown.

    Args:
        files: `urls`, tried in order, and the known `size` or None, as in the spec of a download.
        seconds: limit for all requests together; later answers are ignored.
    """
    deadline = time.monotonic() + seconds
    sizes: list[int | None] = [file["size"] for file in files]

    def ask(place: int) -> None:
        for url in files[place]["urls"]:
            if sizes[place] is None and (left := deadline - time.monotonic()) > 0:
                sizes[place] = remote_size(url, left)

    # Daemons: a name server that does not answer must not hold up the run.
    threads = [
        threading.Thread(target=ask, args=(place,), daemon=True) for place, size in enumerate(sizes) if size is None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(sizes)


def remote_size(url: str, seconds: float) -> int | None:
    """Return the Content-Length of a file on a server, None without an answer of status 200 in time."""
    try:
        with MirrorClient(url, seconds) as client, client.get({}, "HEAD") as response:
            length = response.headers.get("Content-Length", "")
            return int(length) if response.status_code == 200 and length.isdecimal() and int(length) else None
    except (FetchError, TransientError, UserError, OSError):
        return None  # the download itself reports what is wrong
