"""Images to vectors with open_clip."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field, model_validator

from cm3.common.errors import UserError
from cm3.common.strict import Float, nearest
from extractors.image.base import ArchitectureSpec, ImageModel
from extractors.runtime.precision import torch_dtype
from extractors.spec import Cost
from extractors.weights.hub import checked_path
from extractors.weights.pickles import pickled_in
from extractors.weights.pretrained import loaded, on_device

if TYPE_CHECKING:
    import torch

_CONFIG = "open_clip_config.json"
_ASSUMED: dict[str, Any] = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""OpenAI's preprocessing: open_clip's default."""


class OpenClipSpec(ArchitectureSpec):
    """The image tower of a CLIP model of open_clip."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("open_clip_torch", "torch", "torchvision", "pillow")
    cost: ClassVar[Cost] = Cost(2500, 3000, 20)

    backend: Literal["open_clip"] = Field(description="Encode images with the image tower of an open_clip model.")
    force_quick_gelu: bool = Field(
        False, description="Use the QuickGELU activation, as for local copies of OpenAI's weights."
    )
    mean: list[Float] | None = Field(
        None, min_length=3, max_length=3, description="Per channel, for pixel values between 0 and 1."
    )
    std: list[Float] | None = Field(
        None, min_length=3, max_length=3, description="Per channel, for pixel values between 0 and 1."
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(None, description="Resize filter.")
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="How images become square: crop (shortest), pad (longest) or stretch (squash)."
    )

    @model_validator(mode="after")
    def _model_is_named(self) -> "OpenClipSpec":
        path = self.weights_path
        if self.model is None and self.hub is None and not (path and path.is_dir()):
            raise ValueError("model: open_clip needs an architecture's name with a file of weights, such as ViT-B-32")
        return self

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of local weights, and the preprocessing that a description next to the file changes."""
        found, path = super().model_identity(), self.weights_path
        described = description_next_to(path) if path is not None and path.is_file() else None
        return found | ({"described": described} if described else {})

    def load(self) -> "OpenClipExtractor":
        """Load the model."""
        return OpenClipExtractor(self)


class OpenClipExtractor(ImageModel):
    """A loaded open_clip model with the preprocessing of its weights."""

    def __init__(self, spec: OpenClipSpec) -> None:
        import open_clip
        from safetensors import SafetensorError

        super().__init__(spec)
        folder = checked_path(spec)
        name, file = _source(spec, folder)
        settings = _settings(spec, file)
        try:
            # This function requires weights: others only warn and continue with random ones.
            model, preprocess = open_clip.create_model_from_pretrained(
                name, None if file is None else str(file), weights_only=True, **settings
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{file or name}: not weights of an open_clip model: {str(error)[:500]}") from error
        self.preprocess = preprocess
        # open_clip ends with these two; `pixels` and `normalised` do the same in two steps.
        *self._geometry, self._to_tensor, self._normalise = preprocess.transforms
        self._constants: dict[torch.device, list[torch.Tensor]] = {}
        self.preprocessing = dict(model.visual.preprocess_cfg)
        kind = "an open_clip model"
        self.model = on_device(model.eval(), self.device, kind, spec, folder, dtype=torch_dtype(spec.precision))
        self.dim = loaded(self.measured_dim, kind, spec, folder)

    def facts(self) -> dict[str, Any]:
        """Return the preprocessing in use."""
        return {"preprocessing": {**self.preprocessing, "library": "open_clip"}}

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """Return a (3, side, side) float tensor: resized, cropped and normalised."""
        prepared: torch.Tensor = self.preprocess(image)
        return prepared

    def pixels(self, image: Image.Image) -> "torch.Tensor":
        """Return a (3, side, side) uint8 tensor: resized and cropped."""
        from torchvision.transforms.functional import pil_to_tensor

        for transform in self._geometry:
            image = transform(image)
        found: torch.Tensor = pil_to_tensor(image)
        return found

    def normalised(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, 3, side, side) float tensors of uint8 ones."""
        import torch

        # Made once a device: a new tensor there would wait for it, and so would torchvision's function.
        if stack.device not in self._constants:
            values = ([255.0], self._normalise.mean, self._normalise.std)
            self._constants[stack.device] = [
                torch.tensor(list(some), dtype=torch.float32, device=stack.device)[:, None, None] for some in values
            ]
        white, mean, std = self._constants[stack.device]
        # A tensor as divisor: CUDA multiplies by the inverse of a number.
        return (stack.float() / white).sub_(mean).div_(std)

    def forward(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d) image embeddings in the space shared with text."""
        vectors: torch.Tensor = self.model.encode_image(stack.to(torch_dtype(self.spec.precision)))
        return vectors


def _source(spec: OpenClipSpec, path: Path) -> tuple[str, Path | None]:
    """Return open_clip's name of the model, and the file of weights unless the name implies it."""
    import open_clip

    if path.is_dir() and (spec.model is None or (path / _CONFIG).is_file()):
        return f"local-dir:{path}", None
    if spec.model not in open_clip.list_models():
        known = open_clip.list_models()
        raise UserError(f"model = {spec.model!r}: open_clip has no such architecture{nearest(str(spec.model), known)}")
    return str(spec.model), _weights_in(path) if path.is_dir() else path


def _settings(spec: OpenClipSpec, file: Path | None) -> dict[str, Any]:
    """Return open_clip's arguments for activation and preprocessing: from the spec, a description or the architecture.

    Raises:
        UserError: the known weights of the architecture use several kinds of preprocessing.
    """
    given = spec.model_dump(include=set(_ASSUMED), exclude_none=True)
    described = None if file is None else description_next_to(file)
    if file is not None and described is None:
        given = _of_architecture(spec, file, given) | given
    described = described or {}
    quick = spec.force_quick_gelu or described.pop("quick_gelu", False)
    return {"force_quick_gelu": quick, **{f"image_{field}": value for field, value in (described | given).items()}}


def _of_architecture(spec: OpenClipSpec, file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing that all known weights of the architecture and activation share."""
    import open_clip

    tags = [
        open_clip.get_pretrained_cfg(spec.model, tag) for tag in open_clip.list_pretrained_tags_by_model(spec.model)
    ]
    known = [tag for tag in tags if tag.get("quick_gelu", False) == spec.force_quick_gelu] or tags
    found: dict[str, Any] = {}
    several: dict[str, str] = {}
    for field, usual in _ASSUMED.items():
        values = sorted({str(tag.get(field, usual)): tag.get(field, usual) for tag in known}.items())
        if len(values) > 1 and field not in given:
            several[field] = " or ".join(text for text, _ in values)
        elif values:
            found[field] = values[0][1]
    if several:
        choices = "; ".join(f"{field}: {values}" for field, values in several.items())
        raise UserError(
            f"{file}: the preprocessing of {spec.model} depends on how the weights were trained ({choices}), and the "
            f"file does not contain it. Put the {_CONFIG} that was published with it into the same folder, or set "
            f"{', '.join(several)} according to its model card"
        )
    return found


def description_next_to(file: Path) -> dict[str, Any] | None:
    """Return the settings of open_clip_config.json next to the weights that differ from open_clip's defaults; None without one.

    Raises:
        UserError: the file is not such a description.
    """
    path = file.parent / _CONFIG
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        stated = described.get("preprocess_cfg", {})
        changed = {field: stated[field] for field, usual in _ASSUMED.items() if stated.get(field) not in (None, usual)}
        return changed | ({"quick_gelu": True} if described["model_cfg"].get("quick_gelu") else {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a description of an open_clip model ({type(error).__name__}: {error})") from None


def _weights_in(folder: Path) -> Path:
    """Return the one file of weights in a folder without a description of its model.

    Raises:
        UserError: there are several.
    """
    files = sorted(folder.glob("*.safetensors")) or pickled_in(folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder}: has several files of weights ({names}); set weights to one of them")
    return files[0]
