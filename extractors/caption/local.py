"""Captioners whose weights are on this machine: their model, its processor, and batches of pictures that decode."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cm3.common.errors import UserError
from extractors.caption.base import Answer, Captioned, Captioner, Prompted, readable
from extractors.extractor import Advance, silent
from extractors.runtime.prefetch import chunks
from extractors.weights.pretrained import load_part
from extractors.weights.spec import ModelSpec

KIND = "a vision-language model"
PICTURES_PER_BATCH = {"cpu": 4, "mps": 4, "cuda": 16}
Asked = tuple[Image.Image, str]
"""A decoded picture and its prompt."""


class BatchCaptioner(Captioner):
    """A captioner that answers many pictures at once."""

    @abstractmethod
    def size(self) -> int:
        """Return how many pictures are decoded for one call of `answer`."""

    @abstractmethod
    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Return the answer to each picture and prompt."""

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Captioned:
        """Caption pictures; those that can't be decoded, and empty answers, are failed with the reason."""
        answers: list[Answer] = []
        for group in chunks(inputs, self.size):
            pictures = [readable(one.picture, self.spec.max_pixels) for one in group]
            asked = [(p, one.prompt) for p, one in zip(pictures, group, strict=True) if not isinstance(p, str)]
            given = iter(self.answer(asked) if asked else [])
            part = [Answer("", reason=p) if isinstance(p, str) else next(given) for p in pictures]
            answers += part
            ok = sum(bool(answer.text) for answer in part)
            advance(len(part), ok=ok, failed=len(part) - ok)
        return Captioned.of(answers)


def chat_of(prompt: str, picture: Image.Image | None = None) -> list[dict[str, object]]:
    """Return a chat of one message: a picture, or the place of one, and then the prompt."""
    image: dict[str, object] = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]


def processor_of(spec: ModelSpec, folder: Path) -> Any:
    """Return the processor of pictures and texts in a model's folder; it pads in front.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, spec, folder, KIND)
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{folder}: has no processor of pictures and texts, so it is not {KIND}")
    # A decoder goes on at the right end: with padding there it would continue the padding.
    processor.tokenizer.padding_side = "left"
    return processor


def name_of(spec: ModelSpec) -> str:
    """Return how a reader would name a spec's model: a hub id with its commit, a package, or a digest of weights."""
    if spec.repository:
        return f"{spec.repository}@{spec.commit()}"
    parts = {"package": spec.package} | spec.model_identity()
    return " ".join(f"{name} {value}" for name, value in parts.items() if value)
