"""Batches of decoded images with prompts; on a GPU the next batch is prepared while the model computes on one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from cm3.common.device import is_out_of_memory
from extractors.caption.prompt import Prompted
from extractors.runtime.batch import Batch, CudaMemory, MeasuredBatch
from extractors.runtime.prefetch import chunks, default_workers, map_ahead

R = TypeVar("R")
Asked = tuple[Image.Image, str]
"""A decoded image and its prompt."""
IMAGES_PER_BATCH = {"cpu": 4, "mps": 4, "cuda": 16}
"""Images of the first batch; on a GPU, its memory determines the next ones."""
MOST_IMAGES = 256


def image_batch(batch_size: int | None, device: str, most: int = MOST_IMAGES) -> Batch:
    """Return the batch size of a vision-language model: as configured, else what suits the device, `most` on a GPU."""
    if batch_size is None and device == "cuda":
        return MeasuredBatch(IMAGES_PER_BATCH[device], most, CudaMemory())
    return Batch(batch_size or IMAGES_PER_BATCH[device])


@dataclass
class PreparedBatch:
    """The images of a batch.

    Attributes:
        images: for each input the image, or the reason why it cannot be decoded.
        asked: the decoded images with their prompts.
        features: the model's inputs for them; None: not made yet.
    """

    images: list[Image.Image | str]
    asked: list[Asked]
    features: Any = None

    def outputs(self, batch: Batch, forward: Callable[..., Iterable[R]]) -> list[R]:
        """Return forward(asked, features) for all decoded images; if memory runs out, forward(part) of smaller parts.

        Raises:
            UserError: memory ran out on a single image.
        """
        if self.features is not None and len(self.asked) <= batch.size:
            found = batch.attempt(lambda asked: list(forward(asked, self.features)), self.asked)
            if found is not None:
                return found
        self.features = None  # they may be in the device's memory
        return batch.all(forward, self.asked)


def prepared_batches(
    inputs: Iterable[Prompted],
    size: Callable[[], int],
    decode: Callable[[bytes], Image.Image | str],
    features_of: Callable[[Sequence[Asked]], Any],
    device: str,
    workers: int | None = None,
) -> Iterator[PreparedBatch]:
    """Yield the inputs in batches; on a GPU with features, each prepared while the caller works on the one before.

    Args:
        inputs: images and prompts.
        size: number of inputs of the next batch.
        decode: returns an image or the reason why it cannot be decoded. Runs in threads.
        features_of: returns the model's inputs for images and prompts, None if it makes them itself. Runs in a thread.
        device: cpu, cuda or mps.
        workers: threads that decode; default: one per CPU.
    """
    if device == "cpu":  # preparation would take cores from the model
        for group in chunks(inputs, size):
            yield _decoded(group, [decode(one.image) for one in group])
        return

    def prepare(group: Sequence[Prompted]) -> PreparedBatch:
        batch = _decoded(group, list(decoders.map(decode, (one.image for one in group))))
        try:
            batch.features = features_of(batch.asked) if batch.asked else None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # else made again in smaller batches
        return batch

    with ThreadPoolExecutor(max(1, default_workers(workers))) as decoders, ThreadPoolExecutor(1) as pool:
        for [batch] in map_ahead(pool, prepare, ([group] for group in chunks(inputs, size)), 1):
            yield batch


def _decoded(group: Sequence[Prompted], images: list[Image.Image | str]) -> PreparedBatch:
    asked = [(image, one.prompt) for image, one in zip(images, group, strict=True) if not isinstance(image, str)]
    return PreparedBatch(images, asked)
