"""Pictures to vectors with open_clip."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import Field, model_validator

from extractors.device import torch_dtype
from extractors.hub import checked_path
from extractors.image_model import ArchitectureSpec, ImageModel
from extractors.pickles import pickled_in
from stages.errors import UserError
from stages.strict import nearest

if TYPE_CHECKING:
    import torch

_CONFIG = "open_clip_config.json"


class OpenClipSpec(ArchitectureSpec):
    """An image extractor out of open_clip: the image tower of a CLIP model."""

    backend: Literal["open_clip"] = Field(description="Encode pictures with the image tower of an open_clip model.")
    force_quick_gelu: bool = Field(
        False, description="The activation that OpenAI's weights were trained with; set it for local copies of them."
    )

    @model_validator(mode="after")
    def _model_is_named(self) -> "OpenClipSpec":
        path = self.weights_path
        if self.model is None and self.hub is None and not (path and path.is_dir()):
            raise ValueError("model: open_clip needs an architecture's name with a file of weights, such as ViT-B-32")
        return self

    def load(self) -> "OpenClipExtractor":
        """Load the model."""
        return OpenClipExtractor(self)


class OpenClipExtractor(ImageModel):
    """A loaded open_clip model; its preprocessing is the one that belongs to the weights."""

    def __init__(self, spec: OpenClipSpec) -> None:
        import open_clip
        from safetensors import SafetensorError

        super().__init__(spec)
        name, pretrained = _source(spec, checked_path(spec))
        try:
            # Weights are required: without them open_clip only warns and goes on with random ones.
            model, preprocess = open_clip.create_model_from_pretrained(
                name, pretrained, force_quick_gelu=spec.force_quick_gelu, weights_only=True
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{pretrained or name}: not weights of an open_clip model: {str(error)[:500]}") from error
        self.preprocess = preprocess
        self.preprocessing = dict(model.visual.preprocess_cfg)
        self.model = model.eval().to(self.device, torch_dtype(spec.precision))
        self.dim = self.measured_dim()

    def facts(self) -> dict[str, Any]:
        """Return the preprocessing in use."""
        return {"preprocessing": {**self.preprocessing, "library": "open_clip"}}

    def prepare(self, picture: Image.Image) -> "torch.Tensor":
        """Return a (3, side, side) float tensor: resized, cropped and normalised."""
        return self.preprocess(picture)

    def forward(self, stack: "torch.Tensor") -> "torch.Tensor":
        """Return (n, d) image embeddings in the space shared with text."""
        return self.model.encode_image(stack.to(torch_dtype(self.spec.precision)))


def _source(spec: OpenClipSpec, path: Path) -> tuple[str, str | None]:
    """Return open_clip's name of the model, and its file of weights where the name doesn't say."""
    import open_clip

    if path.is_dir() and (spec.model is None or (path / _CONFIG).is_file()):
        return f"local-dir:{path}", None
    if spec.model not in open_clip.list_models():
        known = open_clip.list_models()
        raise UserError(
            f"model = {spec.model!r}: open_clip knows no such architecture{nearest(str(spec.model), known)}"
        )
    return str(spec.model), str(_weights_in(path) if path.is_dir() else path)


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
