"""Threads whose results do not depend on how many they are: each computes whole blocks, with one thread of torch."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of as many threads as torch uses; torch computes with one thread in each of them.

    A matrix product by several threads has other last digits than the product by one.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # The number of this thread never changed, but that of threads to come did.
        torch.set_num_threads(threads)
