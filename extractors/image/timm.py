"""Images to vectors with timm."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.strict import Float
from extractors.image.base import ArchitectureSpec, ImageModel
from extractors.runtime.precision import torch_dtype
from extractors.spec import Cost
from extractors.weights.hub import checked_path
from extractors.weights.pretrained import loaded, on_device

if TYPE_CHECKING:
    import torch

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class TimmSpec(ArchitectureSpec):
    """A timm model without its classifier."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("timm", "torch", "torchvision", "pillow")
    cost: ClassVar[Cost] = Cost(2500, 1500, 20)

    backend: Literal["timm"] = Field(description="Encode images with a timm model without its classifier.")
    model_kwargs: dict[str, str | int | float | bool] = Field(
        {}, description="Further arguments of timm.create_model, such as pad_type: same."
    )
    input_size: int | None = Field(None, gt=0, description="Side of the square input in pixels; default: the model's.")
    mean: list[Float] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description="Per channel, for pixel values between 0 and 1; default: the model's.",
    )
    std: list[Float] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description="Per channel, for pixel values between 0 and 1; default: the model's.",
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="Resize filter; default: the model's."
    )
    crop_pct: Float | None = Field(
        None, gt=0, le=1, description="Side of the crop divided by the side of the resized image; default: the model's."
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        None,
        description="How images become square: crop (center), stretch (squash) or pad (border); default: the model's.",
    )

    @model_validator(mode="after")
    def _model_is_named(self) -> "TimmSpec":
        path = self.weights_path
        if self.model is None and self.hub is None and not (path and path.is_dir()):
            raise ValueError("model: timm needs an architecture's name with a file of weights, such as mobilenetv2_100")
        return self

    def load(self) -> "TimmExtractor":
        """Load the model."""
        return TimmExtractor(self)


class TimmExtractor(ImageModel):
    """A loaded timm model without its classifier; the spec may override the model's own preprocessing."""

    def __init__(self, spec: TimmSpec) -> None:
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        super().__init__(spec)
        path = checked_path(spec)
        model = _build(spec, path)
        own = resolve_data_config(model.pretrained_cfg, model=model)
        given = spec.model_dump(include=set(_PREPROCESSING), exclude_none=True)
        if "input_size" in given:
            given["input_size"] = (3, given["input_size"], given["input_size"])
        self.preprocessing = {key: own[key] for key in _PREPROCESSING} | given
        # The prefetcher's form of the transform: uint8 out, normalised below for the whole batch at once.
        self.transform = create_transform(**self.preprocessing, use_prefetcher=True)
        import torch

        kind = f"a timm model ({type(model).__name__})"
        self.model = on_device(
            model.eval(),
            self.device,
            kind,
            spec,
            path,
            dtype=torch_dtype(spec.precision),
            memory_format=torch.channels_last,
        )

        def per_channel(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=self.device).view(1, 3, 1, 1) * 255

        self.mean = per_channel(self.preprocessing["mean"])
        self.std = per_channel(self.preprocessing["std"])
        self.dim = loaded(self.measured_dim, kind, spec, path)

    def measured_dim(self) -> int:
        """Return d, measured by encoding a white image.

        Raises:
            UserError: the model does not support images of that size.
        """
        try:
            return super().measured_dim()
        except AssertionError as error:
            side = self.preprocessing["input_size"][1]
            raise UserError(
                f"input_size = {side}: {error} Leave it out, or set model_kwargs: {{img_size: {side}}} as well"
            ) from error

    def facts(self) -> dict[str, Any]:
        """Return the preprocessing in use."""
        return {"preprocessing": {**self.preprocessing, "library": "timm"}}

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """Return a (3, side, side) uint8 tensor: resized and cropped."""
        prepared: torch.Tensor = self.transform(image)
        return prepared

    def forward(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d) pooled features."""
        import torch

        pixels = ((stack.float() - self.mean) / self.std).to(torch_dtype(self.spec.precision))
        vectors: torch.Tensor = self.model(pixels.contiguous(memory_format=torch.channels_last))
        return vectors


def _build(spec: TimmSpec, path: Path) -> Any:
    """Return the model without its classifier; all its other tensors come from the checkpoint."""
    import timm
    from safetensors import SafetensorError

    name = spec.model or str(path)
    if not path.is_dir() and not timm.is_model(name):
        raise UserError(f"model = {name!r}: timm has no such architecture{_nearest_architecture(name)}")
    try:
        model = _from_folder(path, spec) if path.is_dir() else _from_file(name, path, spec)
        model.reset_classifier(0)
    except (OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not weights of the timm model {name}: {_brief(error)}") from error
    return model


def _from_folder(folder: Path, spec: TimmSpec) -> Any:
    """Return the model of a folder in the format of the hub: config.json and model.safetensors."""
    import timm

    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    if spec.model is not None and spec.model.split(".")[0] != architecture:
        raise UserError(
            f"model = {spec.model!r}: {folder} holds weights of {architecture}; leave model out or correct it"
        )
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **dict[str, Any](spec.model_kwargs))


def _from_file(name: str, file: Path, spec: TimmSpec) -> Any:
    """Return the model `name` with the weights of a file, which may hold a classifier of any width."""
    import timm

    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
    heads = [f"{head}.weight" for head in ([classifier] if isinstance(classifier, str) else classifier)]
    shapes = _shapes(file)
    classes = next((shapes[head][0] for head in heads if head in shapes), 0)
    overlay = {"file": str(file), "num_classes": classes}
    arguments: dict[str, Any] = {"num_classes": classes, **spec.model_kwargs}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def _shapes(file: Path) -> dict[str, Sequence[int]]:
    """Return the shapes of a checkpoint's tensors by name."""
    if file.suffix != ".safetensors":
        from timm.models import load_state_dict

        return {name: tensor.shape for name, tensor in load_state_dict(str(file), weights_only=True).items()}
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - not a dict


def _nearest_architecture(name: str) -> str:
    import timm

    close = difflib.get_close_matches(name, timm.list_models(), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + " ..."
