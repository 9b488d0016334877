"""Joint image-text embeddings: pooled hidden states of a vision-language model."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from cm3.common.device import select_device
from cm3.common.errors import UserError
from extractors.caption.base import MAX_ASPECT
from extractors.caption.batches import Asked, image_batch
from extractors.caption.local import KIND, chat_features, on_model_device, processor_of
from extractors.caption.prompt import PLACEHOLDERS, Prompted, PromptedSpec
from extractors.image.item_images import image_of
from extractors.multimodal.base import ImageTextModel
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
from extractors.text.pooling import pool
from extractors.weights.hub import checked_path, model_path
from extractors.weights.pretrained import load_model, loaded, on_device
from extractors.weights.spec import CodeSpec

PROMPT = "{title}\nSummarise this product in one word:"


class TransformersMllmSpec(PromptedSpec, CodeSpec):
    """A vision-language model as an encoder: hidden states for an image and a prompt, pooled to one vector."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")
    cost: ClassVar[Cost] = Cost(6000, 32000, 1)
    runtime_fields: ClassVar[frozenset[str]] = CodeSpec.runtime_fields | {"allow_slow"}
    shard_items: ClassVar[int | None] = 256

    modality: str = Field(description="Any name, such as mllm.")
    backend: Literal["transformers-mllm"] = Field(description="Pool hidden states of a vision-language model.")
    precision: Literal["float32", "tf32", "autocast", "bfloat16"] = Field(
        "bfloat16",
        description="Number format; tf32: float32 weights, products and convolutions with a mantissa of ten bits on NVIDIA "
        "GPUs; autocast: float32 weights, products in bfloat16, norms and sums in float32.",
    )
    prompt: str = Field(PROMPT, min_length=1, description="Text after the image; " + PLACEHOLDERS)
    layer: int = Field(-1, description="Layer of the hidden states: -1 is the last layer, 0 the input of the first.")
    pooling: Literal["mean", "last"] = Field(
        "last",
        description="last: the last token, which attends to all others; mean: all tokens, those of the image included.",
    )
    normalise: bool = Field(True, description="Scale vectors to unit length.")
    allow_slow: bool = Field(False, description="Allow encoding on a CPU that takes hours.")

    def check_cpu_time(self, items: int) -> None:
        """Log the estimated hours of a large model on a CPU.

        Raises:
            UserError: more than an hour, and allow_slow is not set.
        """
        parameters = parameters_of(model_path(self))
        if select_device(self.device, "device").type == "cpu" and parameters >= LARGE:
            check_cpu_hours(parameters, items, self.cpu_hours(parameters, items), self.allow_slow)

    def cpu_hours(self, parameters: int, items: int) -> float:
        """Return the estimated hours on this CPU."""
        speed = seconds_per_parameter("float32" if self.precision in ("float32", "tf32") else "bfloat16")
        return hours(parameters, items, tokens_of(self.max_pixels, self.prompt), 0, speed)

    def load(self) -> "TransformersMllmExtractor":
        """Load the model."""
        return TransformersMllmExtractor(self)


class TransformersMllmExtractor(ImageTextModel):
    """A loaded vision-language model without its language head."""

    def __init__(self, spec: TransformersMllmSpec) -> None:
        from transformers import AutoModelForImageTextToText

        self.spec = spec
        self.device = select_device(spec.device, "device").type
        folder = checked_path(spec)
        self.processor = processor_of(spec, folder)
        model = load_model(AutoModelForImageTextToText, spec, folder, KIND, unused=("lm_head.",))
        self.model = on_device(model.base_model, self.device, KIND, spec, folder)
        # A model that cannot be loaded without its head returns its last states only among the hidden states.
        self.last = spec.layer == -1 and self.model is not model
        layers = self.model.config.get_text_config().num_hidden_layers
        if not -layers - 1 <= spec.layer <= layers:
            raise UserError(f"layer = {spec.layer}: the model has {layers} layers, so it is {-layers - 1} to {layers}")
        self.batch = image_batch(spec.batch_size, self.device)
        # A tokenizer is not safe for two threads: after memory ran out, a batch is made anew while the next one is made.
        self.tokenizing = threading.Lock()
        white = Image.new("RGB", (56, 56), "white")
        self.dim = loaded(lambda: self.vectors([(white, spec.prompt_of({}))]).shape[1], KIND, spec, folder)

    def facts(self) -> dict[str, Any]:
        """Return architecture, prompt, pooling and preprocessing."""
        return {
            "model": type(self.model).__name__,
            "prompt": self.spec.prompt,
            "layer": self.spec.layer,
            "pooling": self.spec.pooling,
            **self.spec.chat_facts(),
            "preprocessing": {
                **self.spec.pixel_facts(),
                "max_aspect": MAX_ASPECT,
                "processor": type(self.processor).__name__,
                "library": "transformers",
            },
        }

    def input_of(self, item: Mapping[str, Any]) -> Prompted | None:
        """Return the item's image with the prompt of its fields; None without an image."""
        image = image_of(item)
        return None if image is None else Prompted(image, self.spec.prompt_of(item))

    def features_of(self, asked: Sequence[Asked]) -> Any:
        """Return the tokens and pixels of images and prompts."""
        with self.tokenizing:
            return chat_features(self.processor, self.spec, self.model, asked)

    def vectors(self, asked: Sequence[Asked], features: Any = None) -> np.ndarray:
        """Return (n, d) float32 vectors of n images with their prompts."""
        import torch

        batch = on_model_device(self.features_of(asked) if features is None else features, self.model)
        with torch.inference_mode(), arithmetic(self.device, self.spec.precision):
            output = self.model(**batch, use_cache=False, output_hidden_states=not self.last)
        states = output.last_hidden_state if self.last else output.hidden_states[self.spec.layer]
        found = pool(states.float(), batch["attention_mask"], self.spec.pooling)
        if self.spec.normalise:
            found = torch.nn.functional.normalize(found, dim=-1)
        return found.cpu().numpy()
