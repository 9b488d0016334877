"""Common to captioners that run the model on this machine: processor, chat messages, answers by batches."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cm3.common.errors import UserError
from extractors.caption.base import Answer, Captioner, CaptionResult, load_image
from extractors.caption.batches import Asked, PreparedBatch, prepared_batches
from extractors.caption.prompt import Prompted, PromptedSpec
from extractors.extractor import Advance, silent
from extractors.runtime.slabs import pinned_for
from extractors.weights.pretrained import load_part
from extractors.weights.spec import ModelSpec

KIND = "a vision-language model"


class BatchCaptioner(Captioner):
    """A captioner that processes images in batches; on a GPU, the next batch is prepared while one is answered."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of images to decode for one call of `answer`."""

    @abstractmethod
    def answer(self, batch: PreparedBatch) -> list[Answer]:
        """Return the answer to each decoded image and prompt of a batch."""

    def features_of(self, asked: Sequence[Asked]) -> Any:
        """Return the model's inputs for images and prompts, None if `answer` makes them. Runs in a thread."""
        return None

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> CaptionResult:
        """Caption images in input order; undecodable images and empty answers are failed with the reason."""
        answers: list[Answer] = []
        spec = self.spec
        decode = partial(load_image, max_pixels=spec.max_pixels, min_pixels=spec.min_pixels)
        for batch in prepared_batches(inputs, self.size, decode, self.features_of, self.device, spec.workers):
            given = iter(self.answer(batch) if batch.asked else [])
            part = [Answer("", reason=one) if isinstance(one, str) else next(given) for one in batch.images]
            answers += part
            ok = sum(bool(answer.text) for answer in part)
            advance(len(part), ok=ok, failed=len(part) - ok)
        return CaptionResult.of(answers)


def chat_of(spec: PromptedSpec, prompt: str, image: Image.Image | None = None) -> list[dict[str, object]]:
    """Return a chat: the system prompt if there is one; then an image (or a placeholder without one) and the prompt."""
    part: dict[str, object] = {"type": "image"} if image is None else {"type": "image", "image": image}
    message: dict[str, object] = {"role": "user", "content": [part, {"type": "text", "text": prompt}]}
    if spec.system_prompt is None:
        return [message]
    return [{"role": "system", "content": [{"type": "text", "text": spec.system_prompt}]}, message]


def chat_features(processor: Any, spec: PromptedSpec, model: Any, asked: Sequence[Asked]) -> Any:
    """Return the tokens and pixels of a batch of images and prompts: on the host, in the model's number format."""
    import torch

    features = processor.apply_chat_template(
        [chat_of(spec, prompt, image) for image, prompt in asked],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        sanitize_control_tokens=True,  # a title may contain control tokens of the model
        **(spec.chat_template_kwargs or {}),
    ).to(dtype=model.dtype)
    for name, value in features.items():
        if isinstance(value, torch.Tensor):
            features[name] = pinned_for(model.device, value)
    return features


def on_model_device(features: Any, model: Any) -> Any:
    """Return the result of `chat_features` on the model's device; on CUDA the copy may still be in progress."""
    return features.to(model.device, non_blocking=model.device.type == "cuda")


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
