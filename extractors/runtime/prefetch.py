"""Bounded prefetching: apply a function to chunks of inputs in a pool of threads or processes, in order."""

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
    """Yield lists of at most size() consecutive inputs; size() is called for every list."""
    iterator = iter(inputs)
    while chunk := list(itertools.islice(iterator, size())):
        yield chunk


def map_ahead(
    pool: Executor, function: Callable[[T], R], groups: Iterable[list[T]], lookahead: int
) -> Iterator[list[R]]:
    """Yield the results of each group in order, while up to `lookahead` later groups are processed."""
    waiting: deque[list[Future[R]]] = deque()
    for group in groups:
        waiting.append([pool.submit(function, value) for value in group])
        if len(waiting) > lookahead:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of new processes that end with their parent, even if it is killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def default_workers(workers: int | None) -> int:
    """Return the number of workers: as configured, else one per CPU that this process may use."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
