"""Work on inputs in chunks by a pool of threads or processes, in order, a bounded number of chunks ahead."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def chunks(inputs: Iterable[T], size: Callable[[], int]) -> Iterator[list[T]]:
    """Yield lists of at most size() consecutive inputs; the size may change on the way."""
    iterator = iter(inputs)
    while chunk := list(itertools.islice(iterator, size())):
        yield chunk


def map_ahead(
    pool: Executor, function: Callable[[T], R], groups: Iterable[list[T]], lookahead: int
) -> Iterator[list[R]]:
    """Yield the results of each group in order, while up to `lookahead` later groups are under way."""
    waiting: deque[list[Future[R]]] = deque()
    for group in groups:
        waiting.append([pool.submit(function, value) for value in group])
        if len(waiting) > lookahead:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of fresh processes that end when their parent is gone, even when it was killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def default_workers(workers: int | None) -> int:
    """Return the number of workers: as configured, else one per processor that this process may use."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
