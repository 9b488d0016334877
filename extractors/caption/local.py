"""Common to captioners that run the model on this machine: processor, chat messages, batches of decoded images."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from cm3.common.device import is_out_of_memory
from cm3.common.errors import UserError
from extractors.caption.base import Answer, Captioner, CaptionResult, load_image
from extractors.caption.prompt import Prompted, PromptedSpec
from extractors.extractor import Advance, silent
from extractors.runtime.batch import Batch, CudaMemory, MeasuredBatch
from extractors.runtime.prefetch import chunks, map_ahead
from extractors.weights.pretrained import load_part
from extractors.weights.spec import ModelSpec

KIND = "a vision-language model"
IMAGES_PER_BATCH = {"cpu": 4, "mps": 4, "cuda": 16}
"""Images of the first batch; on a GPU, its memory determines the next ones."""
MOST_IMAGES = 256
Asked = tuple[Image.Image, str]
"""A decoded image and its prompt."""


def image_batch(batch_size: int | None, device: str) -> Batch:
    """Return the batch size of a vision-language model: as configured, else what suits the device."""
    if batch_size is None and device == "cuda":
        return MeasuredBatch(IMAGES_PER_BATCH[device], MOST_IMAGES, CudaMemory())
    return Batch(batch_size or IMAGES_PER_BATCH[device])


class BatchCaptioner(Captioner):
    """A captioner that processes images in batches; on a GPU, the next batch is prepared while one is answered."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of images to decode for one call of `answer`."""

    @abstractmethod
    def answer(self, asked: Sequence[Asked], features: Any = None) -> list[Answer]:
        """Return the answer to each image and prompt.

        Args:
            asked: images and prompts.
            features: the result of `features_of`, if they were prepared.
        """

    def features_of(self, asked: Sequence[Asked]) -> Any:
        """Return the model's inputs for images and prompts, None if `answer` makes them. Runs in a thread."""
        return None

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> CaptionResult:
        """Caption images in input order; undecodable images and empty answers are failed with the reason."""
        answers: list[Answer] = []
        groups = chunks(inputs, self.size)
        with ThreadPoolExecutor(1) as pool:
            # On a CPU the preparation would take cores from the model.
            ahead = map_ahead(pool, self._prepared, ([group] for group in groups), 0 if self.device == "cpu" else 1)
            for [(images, decoded, features)] in ahead:
                given = iter(self.answer(decoded, features) if decoded else [])
                part = [Answer("", reason=i) if isinstance(i, str) else next(given) for i in images]
                answers += part
                ok = sum(bool(answer.text) for answer in part)
                advance(len(part), ok=ok, failed=len(part) - ok)
        return CaptionResult.of(answers)

    def _prepared(self, group: Sequence[Prompted]) -> tuple[list[Image.Image | str], list[Asked], Any]:
        """Return the image or the failure of each input, the decoded ones with their prompts, and the model's inputs."""
        images = [load_image(one.image, self.spec.max_pixels, self.spec.min_pixels) for one in group]
        decoded = [(i, one.prompt) for i, one in zip(images, group, strict=True) if not isinstance(i, str)]
        if self.device == "cpu" or not decoded:
            return images, decoded, None
        try:
            return images, decoded, self.features_of(decoded)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return images, decoded, None  # made again in smaller batches


def chat_of(spec: PromptedSpec, prompt: str, image: Image.Image | None = None) -> list[dict[str, object]]:
    """Return a chat: the system prompt if there is one; then an image (or a placeholder without one) and the prompt."""
    part: dict[str, object] = {"type": "image"} if image is None else {"type": "image", "image": image}
    message: dict[str, object] = {"role": "user", "content": [part, {"type": "text", "text": prompt}]}
    if spec.system_prompt is None:
        return [message]
    return [{"role": "system", "content": [{"type": "text", "text": spec.system_prompt}]}, message]


def rendered(processor: Any, spec: PromptedSpec, prompt: str) -> str:
    """Return the text of a chat with a placeholder for its image, up to the beginning of the answer."""
    text: str = processor.apply_chat_template(
        chat_of(spec, prompt), add_generation_prompt=True, tokenize=False, **(spec.chat_template_kwargs or {})
    )
    return text


def processor_of(spec: ModelSpec, folder: Path) -> Any:
    """Return the multimodal processor in a model's folder, with left padding.

    Raises:
        UserError: the folder has no such processor, or its chat template lacks a variable of chat_template_kwargs.
    """
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, spec, folder, KIND)
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{folder}: has no processor of images and texts, so it is not {KIND}")
    # A decoder continues at the right end, where it would continue the padding.
    processor.tokenizer.padding_side = "left"
    if isinstance(spec, PromptedSpec):
        _check_variables(spec, processor, folder)
    return processor


def _check_variables(spec: PromptedSpec, processor: Any, folder: Path) -> None:
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    for name in spec.chat_template_kwargs or ():
        # A template ignores variables that it does not know.
        if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"{folder}: its chat template has no variable {name!r}; correct chat_template_kwargs")


def name_of(spec: ModelSpec) -> str:
    """Return a readable name of the model: hub id with commit, package, or digest of the weights."""
    if spec.repository:
        return f"{spec.repository}@{spec.commit()}"
    parts = {"package": spec.package} | spec.model_identity()
    return " ".join(f"{name} {value}" for name, value in parts.items() if value)
