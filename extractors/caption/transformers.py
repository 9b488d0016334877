"""Captions from a vision-language model through transformers."""

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from cm3.common.device import select_device
from extractors.caption.base import Answer, CaptionSpec
from extractors.caption.batches import Asked, PreparedBatch, image_batch
from extractors.caption.local import (
    KIND,
    BatchCaptioner,
    chat_features,
    name_of,
    on_model_device,
    processor_of,
    rendered,
)
from extractors.caption.thoughts import MarkerTokens, ends_inside_thought
from extractors.runtime.cpu_estimate import (
    LARGE,
    check_cpu_hours,
    hours,
    parameters_of,
    seconds_per_parameter,
    tokens_of,
)
from extractors.runtime.precision import arithmetic
from extractors.spec import Cost
from extractors.weights.hub import model_path
from extractors.weights.pretrained import load_model, loaded, on_device
from extractors.weights.spec import ModelSpec

_SERVER = "use a server that has one (backend: openai-caption, see docs/captions.md), "


class TransformersCaptionSpec(CaptionSpec, ModelSpec):
    """Captions from a vision-language model; a text extractor then encodes them."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")
    cost: ClassVar[Cost] = Cost(6000, 32000, 0.2)
    runtime_fields: ClassVar[frozenset[str]] = CaptionSpec.runtime_fields | ModelSpec.runtime_fields | {"allow_slow"}
    replace_brackets: ClassVar[bool] = False  # sanitize_control_tokens keeps the text as it is

    backend: Literal["transformers-caption"] = Field(description="Caption images with a vision-language model.")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Number format of the model's arithmetic."
    )
    allow_slow: bool = Field(False, description="Caption on a CPU even if that takes hours.")

    def check_cpu_time(self, items: int) -> None:
        """Log the estimated hours of a large model on a CPU.

        Raises:
            UserError: the estimate is too long, and allow_slow is not set.
        """
        parameters = parameters_of(model_path(self))
        if select_device(self.device, "device").type == "cpu" and parameters >= LARGE:
            check_cpu_hours(parameters, items, self.cpu_hours(parameters, items), self.allow_slow, _SERVER)

    def cpu_hours(self, parameters: int, items: int) -> float:
        """Return the estimated hours of captions on this CPU."""
        tokens, speed = tokens_of(self.max_pixels, self.prompt), seconds_per_parameter(self.precision)
        return hours(parameters, items, tokens, self.token_limit(), speed)

    def load(self) -> "TransformersCaptioner":
        """Load the model."""
        return TransformersCaptioner(self)


class TransformersCaptioner(BatchCaptioner):
    """A loaded vision-language model that captions images in batches, greedily."""

    def __init__(self, spec: TransformersCaptionSpec) -> None:
        from transformers import AutoModelForImageTextToText

        self.spec: TransformersCaptionSpec = spec
        self.device = select_device(spec.device, "device").type
        folder = model_path(spec)
        self.processor = processor_of(spec, folder)
        self.markers = MarkerTokens(self.processor.tokenizer)
        self.inside = loaded(
            lambda: ends_inside_thought(rendered(self.processor, spec, spec.prompt_of({}))), KIND, spec, folder
        )
        model = load_model(AutoModelForImageTextToText, spec, folder, KIND, use_safetensors=True)
        self.model = on_device(model, self.device, KIND, spec, folder)
        self.batch = image_batch(spec.batch_size, self.device)
        # A tokenizer is not safe for two threads: one prepares a batch while the other decodes answers.
        self.tokenizing = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """Return the model, its architecture, the prompt and the decoding in use."""
        return self.spec.facts(name_of(self.spec)) | {"architecture": type(self.model).__name__}

    def size(self) -> int:
        """Return the current batch size, which shrinks when memory runs out."""
        return self.batch.size

    def answer(self, batch: PreparedBatch) -> list[Answer]:
        """Return the answer to each decoded image and prompt of a batch."""
        return batch.outputs(self.batch, self._generate)

    def features_of(self, asked: Sequence[Asked]) -> Any:
        """Return the tokens and pixels of images and prompts."""
        with self.tokenizing:
            return chat_features(self.processor, self.spec, self.model, asked)

    def _generate(self, asked: Sequence[Asked], features: Any = None) -> list[Answer]:
        import torch

        batch = on_model_device(self.features_of(asked) if features is None else features, self.model)
        limit = self.spec.token_limit()
        with torch.inference_mode(), arithmetic(self.device, self.spec.precision):
            # The model's own generation config may sample or penalise repetition; captions are plain argmax.
            output = self.model.generate(
                **batch,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        answers = output[:, batch["input_ids"].shape[1] :]
        tokens_of_answers = answers.tolist()
        with self.tokenizing:
            texts = self.processor.batch_decode(answers, skip_special_tokens=True)
            texts = [self.markers.decode(*one) for one in zip(tokens_of_answers, texts, strict=True)]
        counts = (answers != self.processor.tokenizer.pad_token_id).sum(dim=1).tolist()
        ends = self.model.generation_config.eos_token_id
        ended = ends if isinstance(ends, list) else [ends]
        return [
            Answer.of(
                text,
                int(count),
                cut=count >= limit and tokens[-1] not in ended,
                inside=self.inside,
            )
            for text, count, tokens in zip(texts, counts, tokens_of_answers, strict=True)
        ]
