"""Captioners whose weights are on this machine: their model, its processor, and batches of images that decode."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cm3.common.errors import UserError
from extractors.caption.base import Answer, Captioned, Captioner, readable
from extractors.caption.prompt import Prompted
from extractors.extractor import Advance, silent
from extractors.runtime.prefetch import chunks
from extractors.weights.pretrained import load_part
from extractors.weights.spec import ModelSpec

KIND = "a vision-language model"
IMAGES_PER_BATCH = {"cpu": 4, "mps": 4, "cuda": 16}
Asked = tuple[Image.Image, str]
"""A decoded image and its prompt."""


class BatchCaptioner(Captioner):
    """A captioner that answers many images at once."""

    @abstractmethod
    def size(self) -> int:
        """Return how many images are decoded for one call of `answer`."""

    @abstractmethod
    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Return the answer to each image and prompt."""

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Captioned:
        """Caption images; those that can't be decoded, and empty answers, are failed with the reason."""
        answers: list[Answer] = []
        for group in chunks(inputs, self.size):
            images = [readable(one.image, self.spec.max_pixels) for one in group]
            asked = [(p, one.prompt) for p, one in zip(images, group, strict=True) if not isinstance(p, str)]
            given = iter(self.answer(asked) if asked else [])
            part = [Answer("", reason=p) if isinstance(p, str) else next(given) for p in images]
            answers += part
            ok = sum(bool(answer.text) for answer in part)
            advance(len(part), ok=ok, failed=len(part) - ok)
        return Captioned.of(answers)


def chat_of(prompt: str, image: Image.Image | None = None) -> list[dict[str, object]]:
    """Return a chat of one message: an image, or the place of one, and then the prompt."""
    part: dict[str, object] = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": prompt}]}]


def processor_of(spec: ModelSpec, folder: Path) -> Any:
    """Return the processor of images and texts in a model's folder; it pads in front.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, spec, folder, KIND)
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{folder}: has no processor of images and texts, so it is not {KIND}")
    # A decoder goes on at the right end: with padding there it would continue the padding.
    processor.tokenizer.padding_side = "left"
    return processor


def name_of(spec: ModelSpec) -> str:
    """Return how a reader would name a spec's model: a hub id with its commit, a package, or a digest of weights."""
    if spec.repository:
        return f"{spec.repository}@{spec.commit()}"
    parts = {"package": spec.package} | spec.model_identity()
    return " ".join(f"{name} {value}" for name, value in parts.items() if value)
