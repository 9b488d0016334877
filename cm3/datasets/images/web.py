"""Image source `urls`: downloads from allowed hosts, rate-limited, resumed from earlier runs."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cm3.common.errors import UserError
from cm3.common.http import is_offline, without_secrets
from cm3.common.ssrf import is_allowed
from cm3.common.tables import FAILED, MISSING, OK
from cm3.datasets.images.alternatives import with_alternatives
from cm3.datasets.images.fetch import NOT_REACHED, Fetcher, without_request
from cm3.datasets.images.shards import KNOWN
from cm3.datasets.images.source import Found, Search, Wanted
from cm3.datasets.images.store import Outcome, Store

_RUNTIME = {"rate": 50.0, "concurrency": 16, "timeout": 30.0, "attempts": 5, "pause": 0.5}


def find(search: Search) -> Iterator[Found]:
    """Download each item's image from the first of its URLs, or of their `alternatives`, with an image that decodes.

    Known outcomes are not requested again: everything that an interrupted run downloaded, and, of a finished run, images
    and permanent absences (HTTP 404 or 410, from Amazon's hosts also 400 or 403, placeholders). Only items that failed
    are retried; an item with an image keeps it, even if an earlier URL failed.

    Raises:
        UserError: CM3_OFFLINE is set and an image is not on disk; or no host answered or is allowed.
    """
    spec = search.spec
    wanted = [Wanted(item.item_id, with_alternatives(item.references, spec)) for item in search.wanted]
    runtime = {**_RUNTIME, "threads": min(os.cpu_count() or 1, 4), **search.runtime}
    stored = search.stored
    with contextlib.closing(Store(search.folder, stored, spec, lambda host: is_allowed(host, spec["hosts"]))) as store:
        _retry_failures(wanted, store, spec)
        earlier = frozenset(store.outcomes)
        unknown = [item for item in wanted if _found(item, store, spec) is None]
        if unknown and is_offline():
            raise UserError(
                f"CM3_OFFLINE is set, and the images of {len(unknown)} items are not on disk: download them on another "
                "machine and set images.folder and images.pattern"
            )
        fetcher, started = Fetcher(spec, runtime, store), time.perf_counter()
        if unknown:
            asyncio.run(fetcher.fetch(unknown))
        seconds = time.perf_counter() - started
        search.facts.update(
            images_known_before=0,
            urls_asked=fetcher.requested,
            fetch_seconds=seconds,
            images_per_second=len(unknown) / seconds if unknown else None,
        )
        found = [_found(item, store, spec) or Found() for item in wanted]
        _stop_unless_reached(found)
        for place in found:
            if place.status == OK and place.image is not None:
                search.facts["images_known_before"] += place.url in earlier
                data = b"" if place.image.sha256 in stored else store.read(place.image.sha256)
                yield Found(place.url, OK, (), (), place.image, data)
            else:
                yield place
        store.write_known(search.fresh / KNOWN, (url for item in wanted for url in item.references))


def _retry_failures(wanted: Sequence[Wanted], store: Store, spec: dict[str, Any]) -> None:
    again: set[str] = set()
    for item in wanted:
        found = _found(item, store, spec)
        if found is None or found.status == FAILED:
            again.update(store.failed_before.intersection(item.references))
    for url in again:
        store.outcomes.pop(url, None)


def _found(item: Wanted, store: Store, spec: dict[str, Any]) -> Found | None:
    """Return the result for an item without a request; None if an outcome is not known."""
    bad: list[Outcome] = []
    for url in item.references:
        outcome = without_request(url, spec) or store.outcomes.get(url)
        if outcome is None:
            return None
        if outcome.status == OK:
            return Found(url, OK, (), (), outcome.image)
        bad.append(outcome)
    if not bad:
        return Found("", MISSING, ("the item names no image",), ("the item names no image",))
    # An image that a later try or other settings may find is not missing, whatever the other URLs gave.
    status = FAILED if any(outcome.status == FAILED for outcome in bad) else MISSING
    return Found(
        item.references[0], status, tuple(outcome.reason for outcome in bad), tuple(outcome.kind for outcome in bad)
    )


def _stop_unless_reached(found: Sequence[Found]) -> None:
    tried = [place for place in found if place.url]
    if tried and all(place.status == FAILED and NOT_REACHED.issuperset(place.kinds) for place in tried):
        raise UserError(
            f"none of {len(tried)} images could be downloaded, because no host answered or is allowed; the first: "
            f"{without_secrets(tried[0].url)}: {'; '.join(tried[0].reasons)}. Check the network, and images.hosts in the config"
        )
