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
from extractors.runtime.device import torch_dtype
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
"""OpenAI's preprocessing, which open_clip takes where nothing says other."""


class OpenClipSpec(ArchitectureSpec):
    """An image extractor out of open_clip: the image tower of a CLIP model."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("open_clip_torch", "torch", "torchvision", "pillow")
    cost: ClassVar[Cost] = Cost(2500, 3000, 20)

    backend: Literal["open_clip"] = Field(description="Encode images with the image tower of an open_clip model.")
    force_quick_gelu: bool = Field(
        False, description="The activation that OpenAI's weights were trained with; set it for local copies of them."
    )
    mean: list[Float] | None = Field(None, min_length=3, max_length=3, description="Per channel, of values in 0..1.")
    std: list[Float] | None = Field(None, min_length=3, max_length=3, description="Per channel, of values in 0..1.")
    interpolation: Literal["bilinear", "bicubic"] | None = Field(None, description="Filter of the resize.")
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="How an image becomes square: cut, pad or squeeze."
    )

    @model_validator(mode="after")
    def _model_is_named(self) -> "OpenClipSpec":
        path = self.weights_path
        if self.model is None and self.hub is None and not (path and path.is_dir()):
            raise ValueError("model: open_clip needs an architecture's name with a file of weights, such as ViT-B-32")
        return self

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of local weights, and what a description beside a file of them changes."""
        found, path = super().model_identity(), self.weights_path
        described = described_beside(path) if path is not None and path.is_file() else None
        return found | ({"described": described} if described else {})

    def load(self) -> "OpenClipExtractor":
        """Load the model."""
        return OpenClipExtractor(self)


class OpenClipExtractor(ImageModel):
    """A loaded open_clip model; its preprocessing is the one that belongs to the weights."""

    def __init__(self, spec: OpenClipSpec) -> None:
        import open_clip
        from safetensors import SafetensorError

        super().__init__(spec)
        folder = checked_path(spec)
        name, file = _source(spec, folder)
        settings = _settings(spec, file)
        try:
            # Weights are required: without them open_clip only warns and goes on with random ones.
            model, preprocess = open_clip.create_model_from_pretrained(
                name, None if file is None else str(file), weights_only=True, **settings
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{file or name}: not weights of an open_clip model: {str(error)[:500]}") from error
        self.preprocess = preprocess
        self.preprocessing = dict(model.visual.preprocess_cfg)
        kind = "an open_clip model"
        self.model = on_device(model.eval(), self.device, kind, spec, folder, dtype=torch_dtype(spec.precision))
        self.dim = loaded(self.measured_dim, kind, spec, folder)

    def facts(self) -> dict[str, Any]:
        """Return the preprocessing in use."""
        return {"preprocessing": {**self.preprocessing, "library": "open_clip"}}

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """Return a (3, side, side) float tensor: resized, cropped and normalised."""
        return self.preprocess(image)

    def forward(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d) image embeddings in the space shared with text."""
        return self.model.encode_image(stack.to(torch_dtype(self.spec.precision)))


def _source(spec: OpenClipSpec, path: Path) -> tuple[str, Path | None]:
    """Return open_clip's name of the model, and its file of weights where the name doesn't say."""
    import open_clip

    if path.is_dir() and (spec.model is None or (path / _CONFIG).is_file()):
        return f"local-dir:{path}", None
    if spec.model not in open_clip.list_models():
        known = open_clip.list_models()
        raise UserError(
            f"model = {spec.model!r}: open_clip knows no such architecture{nearest(str(spec.model), known)}"
        )
    return str(spec.model), _weights_in(path) if path.is_dir() else path


def _settings(spec: OpenClipSpec, file: Path | None) -> dict[str, Any]:
    """Return open_clip's arguments for activation and preprocessing: of the spec, a description, or the architecture.

    Raises:
        UserError: a file of weights whose architecture is known with several kinds of preprocessing.
    """
    given = spec.model_dump(include=set(_ASSUMED), exclude_none=True)
    described = None if file is None else described_beside(file)
    if file is not None and described is None:
        given = _of_architecture(spec, file, given) | given
    described = described or {}
    quick = spec.force_quick_gelu or described.pop("quick_gelu", False)
    return {"force_quick_gelu": quick, **{f"image_{field}": value for field, value in (described | given).items()}}


def _of_architecture(spec: OpenClipSpec, file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing that all known weights of the spec's architecture and activation were trained with."""
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
        told = "; ".join(f"{field}: {values}" for field, values in several.items())
        raise UserError(
            f"{file}: weights of {spec.model} want different preprocessing by what they were trained with ({told}), "
            f"and the file alone doesn't tell. Put the {_CONFIG} that was published with it beside it, or set "
            f"{', '.join(several)} as its model card says"
        )
    return found


def described_beside(file: Path) -> dict[str, Any] | None:
    """Return what open_clip_config.json beside weights says otherwise than open_clip assumes; None without one.

    Raises:
        UserError: it is no such description.
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
        raise UserError(f"{folder}: has several files of weights ({names}); set weights to the one that is meant")
    return files[0]
