"""Pickled weights: accepted only if torch finds tensors and nothing else, because a pickle may hold code."""

import zipfile
from pathlib import Path

from cm3.common.errors import UserError

SUFFIXES = frozenset({".bin", ".pt", ".pth"})
_INSTEAD = {"pytorch_model*.bin": "model*.safetensors", "open_clip_pytorch_model.bin": "open_clip_*.safetensors"}
"""Pickled weights in a model folder -> files that the libraries prefer to them."""

NAMES = tuple(_INSTEAD)
"""Names of pickled weights; other pickles, such as training_args.bin, are never read."""


def pickled_in(folder: Path) -> list[Path]:
    """Return the pickled weights below a folder that a model is loaded from; safetensors in the same folder take precedence."""
    return sorted(
        path
        for name, instead in _INSTEAD.items()
        for path in folder.rglob(name)
        if path.is_file() and not any(path.parent.glob(instead))
    )


def check_weights(path: Path) -> None:
    """Check that a file or folder of weights can be loaded without running code.

    Raises:
        UserError: there are no weights, or a pickle holds more than tensors.
    """
    if path.is_file():
        if path.suffix in SUFFIXES:
            _check_pickle(path)
        elif path.suffix != ".safetensors":
            raise UserError(f"weights = {str(path)!r}: weights must be a .safetensors file or a pickle of tensors")
        return
    pickles = pickled_in(path)
    if not pickles and not any(path.rglob("*.safetensors")):
        raise UserError(f"{path}: has no .safetensors file, and no pytorch_model.bin either; is the download complete?")
    for pickled in pickles:
        _check_pickle(pickled)


def _check_pickle(path: Path) -> None:
    import torch

    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a stranger's pickle makes the reader raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"{path}: a pickle with more than tensors can run any code, so it is refused ({reason}). "
            "Take a revision with safetensors, or convert the weights if you trust them"
        ) from error
