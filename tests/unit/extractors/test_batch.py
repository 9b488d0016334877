"""Batch sizes from the memory of a GPU, and the preparation of the next batch while the model computes on one."""

import threading
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import plain
from hypothesis import given
from hypothesis import strategies as st

import extractors
from extractors.caption.base import Answer
from extractors.caption.batches import MOST_IMAGES, Asked, PreparedBatch, image_batch, prepared_batches
from extractors.caption.local import BatchCaptioner
from extractors.caption.prompt import Prompted
from extractors.multimodal.base import ImageTextModel
from extractors.runtime.batch import Batch, MeasuredBatch, fitting_size


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


class Turns:
    """Waits in a computation until the next batch is prepared, on a GPU; there each batch comes with its features."""

    def __init__(self, device: str) -> None:
        self.device, self.prepared, self.waited = device, threading.Semaphore(0), []

    def prepare(self, asked: Sequence[Asked]) -> list[str]:
        self.prepared.release()
        return [prompt for _, prompt in asked]

    def compute(self, asked: Sequence[Asked], features: Any) -> None:
        assert features == (None if self.device == "cpu" else [prompt for _, prompt in asked])
        batches = {0: 2, 3: 0}.get(len(self.waited), 1)  # the first one and the next; later the next alone
        self.waited.append(self.device != "cpu" and all(self.prepared.acquire(timeout=120) for _ in range(batches)))


class Slow(BatchCaptioner):
    """Answers a batch only when the next one is prepared."""

    def __init__(self, turns: Turns) -> None:
        settings = {"modality": "caption", "backend": "openai-caption", "url": "http://a", "model": "m", "encoder": "t"}
        self.spec: Any = extractors.parse_extractor("x", settings, "extractors.x")
        self.turns, self.device = turns, turns.device

    def size(self) -> int:
        return 2

    def facts(self) -> dict[str, Any]:
        return {}

    def features_of(self, asked: Sequence[Asked]) -> Any:
        return self.turns.prepare(asked)

    def answer(self, batch: PreparedBatch) -> list[Answer]:
        self.turns.compute(batch.asked, batch.features)
        return [Answer(prompt, 1) for _, prompt in batch.asked]


class SlowEncoder(ImageTextModel):
    """Encodes a batch only when the next one is prepared."""

    def __init__(self, turns: Turns) -> None:
        self.spec: Any = types.SimpleNamespace(max_pixels=99, min_pixels=None, workers=2)
        self.turns, self.device, self.dim, self.batch = turns, turns.device, 1, Batch(2)

    def facts(self) -> dict[str, Any]:
        return {}

    def input_of(self, item: Any) -> None:
        return None

    def features_of(self, asked: Sequence[Asked]) -> Any:
        return self.turns.prepare(asked)

    def vectors(self, asked: Sequence[Asked], features: Any = None) -> np.ndarray:
        self.turns.compute(asked, features)
        return np.array([[float(prompt)] for _, prompt in asked])


INPUTS = [Prompted(plain("red", (9, 9)) if n != 3 else b"x", f"{n}") for n in range(7)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_next_batch_is_prepared_during_an_answer_on_gpus(device: str) -> None:
    captioner = Slow(Turns(device))
    result = captioner.run(INPUTS)
    assert result.captions == ["0", "1", "2", "", "4", "5", "6"] and result.errors.keys() == {3}
    assert captioner.turns.waited == [device == "cuda"] * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_next_batch_is_prepared_while_one_is_encoded_on_gpus(device: str) -> None:
    encoder = SlowEncoder(Turns(device))
    seen: list[tuple[int, int, int]] = []
    result = encoder.run(INPUTS, lambda n, ok=0, failed=0: seen.append((n, ok, failed)))
    assert result.embedding[:, 0].tolist() == [0, 1, 2, 0, 4, 5, 6] and result.errors.keys() == {3}
    assert encoder.turns.waited == [device == "cuda"] * 4
    assert seen == [(2, 2, 0), (2, 1, 1), (2, 2, 0), (1, 1, 0)]


def test_memory_that_runs_out_with_prepared_features_drops_them() -> None:
    asked: Any = [("image", f"{n}") for n in range(4)]
    calls: list[tuple[int, Any]] = []
    part = PreparedBatch([], asked, ["features"])

    def forward(given: Sequence[Asked], features: Any = None) -> list[str]:
        calls.append((len(given), features))
        if len(given) > 2:
            raise RuntimeError("CUDA out of memory")
        return [prompt for _, prompt in given]

    assert part.outputs(Batch(4), forward) == ["0", "1", "2", "3"] and part.features is None
    assert calls == [(4, ["features"]), (2, None), (2, None)]


def test_a_batch_that_cannot_be_prepared_for_lack_of_memory_is_made_in_parts() -> None:
    def features_of(asked: Sequence[Asked]) -> Any:
        raise MemoryError

    batches = list(
        prepared_batches(INPUTS, lambda: 4, lambda data: "failed" if data == b"x" else data, features_of, "cuda")
    )  # type: ignore[arg-type,return-value]
    assert [(len(one.images), len(one.asked), one.features) for one in batches] == [(4, 3, None), (3, 3, None)]
