"""Batch sizes from the memory of a GPU, and the preparation of the next batch while one is answered."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fixtures_extractors import plain
from hypothesis import given
from hypothesis import strategies as st

import extractors
from extractors.caption.base import Answer
from extractors.caption.local import MOST_IMAGES, Asked, BatchCaptioner, image_batch
from extractors.caption.prompt import Prompted
from extractors.runtime.batch import MeasuredBatch, fitting_size


class Meter:
    """A device with `free` bytes, on which each input takes 100 bytes."""

    def __init__(self, free: int) -> None:
        self.left, self.count, self.started = free, 0, 0

    def start(self) -> None:
        self.started += 1

    def used(self) -> int:
        return 100 * self.count

    def free(self) -> int:
        return self.left


def test_the_size_fills_a_part_of_the_free_memory() -> None:
    assert fitting_size(free=100_000, used=1600, size=16, most=10_000) == 600
    assert fitting_size(free=100_000, used=1600, size=16, most=256) == 256
    assert fitting_size(free=100, used=1600, size=16, most=256) == 1
    assert fitting_size(free=100, used=0, size=16, most=256) == 256


@given(st.integers(0, 10**12), st.integers(1, 10**11), st.integers(1, 64), st.integers(1, 512))
def test_the_estimated_memory_of_a_batch_is_free(free: int, used: int, size: int, most: int) -> None:
    fitting = fitting_size(free, used, size, most)
    assert 1 <= fitting <= most and (fitting == 1 or fitting * used / size <= free)


def measured(free: int, runs_out: bool = False) -> tuple[MeasuredBatch, list[int], Meter]:
    meter, sizes = Meter(free), []

    def forward(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        meter.count = len(part)
        if runs_out and len(part) > 2:
            raise RuntimeError("CUDA out of memory")
        return [2 * one for one in part]

    batch = MeasuredBatch(4, 64, meter)
    assert batch.all(forward, range(50)) == [2 * one for one in range(50)]
    return batch, sizes, meter


def test_the_first_full_batch_is_measured_once() -> None:
    batch, sizes, meter = measured(free=2000)
    assert sizes == [4, 12, 12, 12, 10] and batch.size == 12 and meter.started == 1
    assert measured(free=10**9)[1] == [4, 46]
    assert measured(free=100)[1][:3] == [4, 4, 4], "never below the first size"


def test_memory_that_runs_out_halves_and_nothing_is_raised_again() -> None:
    batch, sizes, _ = measured(free=10**9, runs_out=True)
    assert sizes[:3] == [4, 2, 2] and batch.size == 2


def test_an_incomplete_batch_is_not_measured() -> None:
    meter = Meter(10**9)
    batch = MeasuredBatch(4, 64, meter)
    assert batch.attempt(list, [1, 2]) == [1, 2] and batch.size == 4 and meter.started == 0


def test_only_gpus_without_a_configured_size_are_measured() -> None:
    assert type(image_batch(None, "cpu")) is not MeasuredBatch and image_batch(None, "cpu").size == 4
    assert type(image_batch(3, "cuda")) is not MeasuredBatch and image_batch(3, "cuda").size == 3
    assert type(image_batch(None, "cuda")) is MeasuredBatch and image_batch(None, "cuda").size == 16 < MOST_IMAGES


class Slow(BatchCaptioner):
    """Answers a batch only when the next one is prepared."""

    def __init__(self, device: str) -> None:
        settings = {"modality": "caption", "backend": "openai-caption", "url": "http://a", "model": "m", "encoder": "t"}
        self.spec: Any = extractors.parse_extractor("x", settings, "extractors.x")
        self.device, self.prepared, self.waited = device, threading.Semaphore(0), []

    def size(self) -> int:
        return 2

    def facts(self) -> dict[str, Any]:
        return {}

    def features_of(self, asked: Sequence[Asked]) -> Any:
        self.prepared.release()
        return [prompt for _, prompt in asked]

    def answer(self, asked: Sequence[Asked], features: Any = None) -> list[Answer]:
        assert features == (None if self.device == "cpu" else [prompt for _, prompt in asked])
        batches = {0: 2, 3: 0}.get(len(self.waited), 1)  # the first one and the next; later the next alone
        waited = self.device != "cpu" and all(self.prepared.acquire(timeout=120) for _ in range(batches))
        self.waited.append(waited)
        return [Answer(prompt, 1) for _, prompt in asked]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_next_batch_is_prepared_during_an_answer_on_gpus(device: str) -> None:
    captioner = Slow(device)
    inputs = [Prompted(plain("red", (9, 9)) if n != 3 else b"x", f"{n}") for n in range(7)]
    result = captioner.run(inputs)
    assert result.captions == ["0", "1", "2", "", "4", "5", "6"] and result.errors.keys() == {3}
    assert captioner.waited == [device == "cuda"] * 4
