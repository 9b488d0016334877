"""Check that every weight of a loaded transformers model comes from its checkpoint, not from a random initialisation."""

import json
import logging
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from extractors.weights.pickles import pickled_in

log = logging.getLogger(__name__)

_RENAMED = {"gamma": "weight", "beta": "bias"}
"""Parameters of norms under their names in old checkpoints, which transformers renames."""


def check_loading_info(
    model: Any, info: Mapping[str, Any], kind: str, folder: Path, unused: Sequence[str] = ()
) -> None:
    """Check the loading info that `from_pretrained(output_loading_info=True)` returns; log unused tensors.

    Args:
        model: the loaded model.
        info: missing_keys, mismatched_keys (with `ignore_mismatched_sizes=True`) and unexpected_keys.
        kind: kind of model, for error messages.
        folder: folder of the checkpoint.
        unused: modules, such as "pooler.", that the caller does not use: their weights may be missing.

    Raises:
        UserError: a used weight is missing from the checkpoint or has another shape in it.
    """
    wrong = [(name, "is not in the checkpoint") for name in sorted(info["missing_keys"])]
    wrong += [
        (name, f"has the shape {list(theirs)} in the checkpoint instead of {list(ours)}")
        for name, theirs, ours in sorted(info["mismatched_keys"])
    ]
    wrong = [(name, fault) for name, fault in wrong if not _is_unused(name, unused)]
    if wrong:
        name, fault = wrong[0]
        raise UserError(
            f"{folder}: not weights of {kind}: {len(wrong)} tensors of {type(model).__name__}, which its config.json "
            f"names, don't fit: {name} {fault}"
        )
    _log_unexpected(type(model).__name__, folder, info["unexpected_keys"])


def check_checkpoint(models: Iterable[Any], kind: str, folder: Path, unused: Sequence[str] = ()) -> None:
    """Check models of transformers that another library has loaded from a folder or its subfolders.

    Names and shapes of the weights are compared with the header of the checkpoint. Only where they differ, as they do for
    architectures whose checkpoints transformers converts while it loads them, the checkpoint is loaded a second time, and
    transformers itself reports what is missing.

    Args:
        models: loaded models; each one has a checkpoint of its own.
        kind: kind of model, for error messages.
        folder: folder of the checkpoints.
        unused: modules, such as "pooler.", that the caller does not use: their weights may be missing.

    Raises:
        UserError: a used weight of a model is missing from every checkpoint or has another shape in it.
    """
    checkpoints = _checkpoints(folder)
    for model in models:
        found = next((one for one in checkpoints if _has_all(model, one, unused)), None)
        if found is None:
            found = _confirmed(model, checkpoints, kind, folder, unused)
        checkpoints.remove(found)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folder and its subfolders that hold a model of transformers."""
    found = []
    for path in sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), path)):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "model_type" in config and _files(path.parent):
            found.append(path.parent)
    return found


def _files(folder: Path) -> list[Path]:
    """Return the files of weights in a model's folder itself."""
    pickles = [path for path in pickled_in(folder) if path.parent == folder]
    return sorted(folder.glob("*.safetensors")) or pickles


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint file's tensors by name; of safetensors, only the header is read."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    import torch

    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _has_all(model: Any, folder: Path, unused: Sequence[str]) -> bool:
    """Return whether the checkpoint has every used weight of a model, by name and shape."""
    stored: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        stored |= {_renamed(name): shape for name, shape in shapes_of(file).items()}
    prefix = f"{model.base_model_prefix}."
    # Tied weights are one tensor under several names, of which a checkpoint has one.
    present: dict[tuple[int, tuple[int, ...]], bool] = {}
    used: set[str] = set()
    for name, tensor in model.state_dict().items():
        names = {name, prefix + name, name.removeprefix(prefix)}
        fitting = {one for one in names if stored.get(one) == tuple(tensor.shape)}
        used |= fitting
        tied = tensor.data_ptr(), tuple(tensor.shape)
        present[tied] = present.get(tied, False) or bool(fitting) or _is_unused(name, unused)
    if all(present.values()):
        _log_unexpected(type(model).__name__, folder, stored.keys() - used)
        return True
    return False


def _renamed(name: str) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.{_RENAMED[last]}" if last in _RENAMED else name


def _confirmed(model: Any, checkpoints: list[Path], kind: str, folder: Path, unused: Sequence[str]) -> Path:
    """Return the first checkpoint of which transformers says that it has every used weight of a model."""
    from transformers import PreTrainedModel

    reasons: list[UserError] = []
    for one in checkpoints:
        try:
            # Of the base class: a model's own from_pretrained may not return the loading info.
            loaded, info = PreTrainedModel.from_pretrained.__func__(  # type: ignore[attr-defined]
                type(model),
                one,
                config=model.config,
                local_files_only=True,
                weights_only=True,
                dtype=model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            check_loading_info(loaded, info, kind, folder, unused)
            return one
        except UserError as reason:
            reasons.append(reason)
    raise reasons[0] if reasons else UserError(f"{folder}: has no checkpoint of {type(model).__name__}")


def _is_unused(name: str, unused: Sequence[str]) -> bool:
    return any(f".{part}" in f".{name}" for part in unused)


def _log_unexpected(model: str, folder: Path, names: Iterable[str]) -> None:
    unexpected = sorted(names)
    if unexpected:
        log.info("%s: %d tensors are not used by %s, such as %s", folder, len(unexpected), model, unexpected[0])
