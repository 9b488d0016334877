"""Image encoders of transformers: CLIP, SigLIP, SigLIP 2 (NaFlex too), DINOv2, DINOv3, ViT and similar models."""

import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field

from cm3.common.errors import UserError
from extractors.image.base import ImageModel, ImageModelSpec
from extractors.runtime.precision import torch_dtype
from extractors.spec import Cost
from extractors.text.pooling import pool
from extractors.weights.hub import checked_path
from extractors.weights.pretrained import load_model, load_part, loaded, on_device
from extractors.weights.spec import CodeSpec

if TYPE_CHECKING:
    import torch

_PREPROCESSING = (
    "image_processor_type",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "max_num_patches",
)
_OF_PATCHES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""Inputs of models that read an image of any shape as a padded list of patches (NaFlex)."""


class TransformersVisionSpec(ImageModelSpec, CodeSpec):
    """Any vision model of transformers, or the image tower of a CLIP or SigLIP."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "pillow")
    cost: ClassVar[Cost] = Cost(2500, 3000, 20)

    backend: Literal["transformers-vision"] = Field(description="Encode images with a vision model of transformers.")
    pooling: Literal["model", "cls", "mean"] = Field(
        "model",
        description="model: the model's own image embedding (of a CLIP, the one compared with text embeddings); "
        "cls: the class token; mean: the mean of the patch tokens.",
    )

    def load(self) -> "TransformersVisionExtractor":
        """Load the model."""
        return TransformersVisionExtractor(self)


class TransformersVisionExtractor(ImageModel):
    """A loaded vision model with the preprocessing of its own folder, computed by torchvision."""

    spec: TransformersVisionSpec

    def __init__(self, spec: TransformersVisionSpec) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__(spec)
        folder = checked_path(spec)
        self.processor = load_part(
            AutoImageProcessor, spec, folder, "a vision model with preprocessor_config.json", backend="torchvision"
        )
        # Many checkpoints of classifiers lack a pooling head; other kinds of pooling do not use it.
        unused = () if spec.pooling == "model" else ("pooler.", "head.", "visual_projection.")
        model = load_model(_auto(folder) or AutoModel, spec, folder, "a vision model", unused)
        self.projected = spec.pooling == "model" and hasattr(model, "get_image_features")
        if spec.pooling != "model":
            model = getattr(model, "vision_model", model)
        elif self.projected and hasattr(model, "text_model"):
            model.text_model = None  # unused: frees its memory
        self.model = on_device(model, self.device, "a vision model", spec, folder)
        shapes = {tuple(self._pixels(Image.new("RGB", size, "white")).shape) for size in ((64, 64), (96, 48))}
        if len(shapes) > 1:
            raise UserError(
                f"{folder}: its preprocessing gives images of different sizes, which cannot be batched; "
                "set do_center_crop, or a size with height and width, in a copy of its preprocessor_config.json"
            )
        kind = f"an image encoder that takes pixels alone ({type(model).__name__})"
        self.dim = loaded(self.measured_dim, kind, spec, folder)

    def facts(self) -> dict[str, Any]:
        """Return architecture, pooling and preprocessing."""
        own = json.loads(self.processor.to_json_string())
        used = {key: own[key] for key in _PREPROCESSING if own.get(key) is not None}
        return {
            "model": type(self.model).__name__,
            "pooling": self.spec.pooling,
            "preprocessing": {
                **used,
                "processor": type(self.processor).__name__,
                "library": f"transformers, {self.processor.backend}",
            },
        }

    def prepare(self, image: Image.Image) -> "torch.Tensor | dict[str, torch.Tensor]":
        """Return a (3, height, width) float tensor: resized, cropped and normalised; of a NaFlex model, its inputs."""
        prepared = self.processor(images=image, return_tensors="pt")
        if "spatial_shapes" in prepared:
            return {name: prepared[name][0] for name in _OF_PATCHES}
        pixels: torch.Tensor = prepared["pixel_values"][0]
        return pixels

    def pixels(self, image: Image.Image) -> "torch.Tensor | dict[str, torch.Tensor]":
        """Return a (3, height, width) uint8 tensor: resized and cropped; of a NaFlex model, its inputs."""
        prepared = self.processor(images=image, return_tensors="pt", do_rescale=False, do_normalize=False)
        pixels: torch.Tensor = prepared["pixel_values"][0]
        return pixels

    def normalised(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, 3, height, width) float tensors of uint8 ones, by the processor's own function."""
        own = self.processor
        found: torch.Tensor = own.rescale_and_normalize(
            stack, own.do_rescale, own.rescale_factor, own.do_normalize, own.image_mean, own.image_std
        )
        return found

    def _pixels(self, image: Image.Image) -> "torch.Tensor":
        prepared = self.prepare(image)
        return prepared["pixel_values"] if isinstance(prepared, dict) else prepared

    def forward(self, stack: "torch.Tensor | dict[str, torch.Tensor]") -> "torch.Tensor":
        """Return (n, d) pooled vectors."""
        inputs = dict(stack) if isinstance(stack, dict) else {"pixel_values": stack}
        inputs["pixel_values"] = inputs["pixel_values"].to(torch_dtype(self.spec.precision))
        if self.projected:
            return _own(self.model.get_image_features(**inputs))
        output = self.model(**inputs)
        if self.spec.pooling == "model":
            return _own(output)
        if isinstance(stack, dict):
            return self._pooled_patches(output.last_hidden_state, stack["pixel_attention_mask"])
        return self._pooled(output.last_hidden_state, stack)

    def _pooled_patches(self, states: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d), the mean of (n, patches, d) hidden states; padding (zeros of the mask) does not count."""
        if self.spec.pooling == "cls":
            raise self._no_class_token()
        return pool(states, mask, "mean")

    def _pooled(self, states: "torch.Tensor", stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d) of (n, tokens, d) hidden states, or of the (n, d, h, w) maps of a convolutional network."""
        if states.ndim == 4:
            states = states.flatten(2).transpose(1, 2)
            first = 0
        else:
            first = max(0, states.shape[1] - self._patches(stack))
        if self.spec.pooling == "mean":
            return states[:, first:].mean(dim=1)
        if first == 0:
            raise self._no_class_token()
        return states[:, 0]

    def _no_class_token(self) -> UserError:
        return UserError(f"pooling = 'cls': {type(self.model).__name__} has no class token; set pooling: model or mean")

    def _patches(self, stack: "torch.Tensor") -> int:
        """Return the number of patch tokens, which class and register tokens precede.

        Models that merge patches have fewer tokens than that, and no class token.
        """
        size = getattr(self.model.config, "patch_size", 1)
        height, width = (size, size) if isinstance(size, int) else size
        return (stack.shape[-2] // height) * (stack.shape[-1] // width)


def _auto(folder: Any) -> Any:
    """Return the class of an image tower saved with its projection, which AutoModel would drop; else None."""
    import transformers

    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return getattr(transformers, named[0], None) if named[0].endswith("VisionModelWithProjection") else None


def _own(output: Any) -> "torch.Tensor":
    """Return a model's own (n, d) image embeddings."""
    vectors = getattr(output, "image_embeds", None)
    if vectors is None:
        vectors = getattr(output, "pooler_output", None)
    if vectors is None:
        raise UserError("pooling = 'model': the model has no image embedding of its own; set pooling: cls or mean")
    flat: torch.Tensor = vectors.flatten(1)
    return flat
