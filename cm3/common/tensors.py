"""Files of tensors: safetensors with metadata as JSON in one entry of the header, and a checksum of all of it."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cm3.common.checksums import PREFIX, verified, with_checksum
from cm3.common.errors import DamagedFileError
from cm3.common.files import atomic, file_error

_DIGEST = "tensors"
"""Key in the metadata of the sha256 of the tensors."""


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any], entry: str = "cm3"
) -> None:
    """Write tensors, and metadata as JSON in an `entry` of the header, atomically."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = with_checksum(metadata | {_DIGEST: _digest(stored)})
    with atomic(path) as temporary:
        try:
            # One header entry only: the order of several is not fixed, and equal runs must give equal bytes.
            save_file(stored, temporary, {entry: json.dumps(described, allow_nan=False)})
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(temporary)) from error


def read_tensors(path: str | os.PathLike[str], entry: str = "cm3") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors, on the CPU, and metadata that `write_tensors` wrote; files of earlier releases have no checksum.

    Raises:
        DamagedFileError: a checksum differs, or the file is not readable.
        UserError: absent, a folder, or without permission.
    """
    try:
        Path(path).open("rb").close()  # the library's errors have no number of the system
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except OSError as error:
        if error.errno is not None:
            raise file_error(path, error) from None
        raise DamagedFileError(path, str(error)) from None
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DamagedFileError(path, f"not a safetensors file: {error}") from None
    if entry in header:
        return tensors, _metadata(path, header[entry], tensors)
    if any(PREFIX in text for text in header.values()):
        raise DamagedFileError(path, "the name of its metadata is altered")
    return tensors, {}


def _metadata(path: str | os.PathLike[str], text: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise DamagedFileError(path, f"its metadata are not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise DamagedFileError(path, "its metadata are not a JSON object")
    metadata = verified(path, stored)
    if metadata.pop(_DIGEST, None) not in (_digest(tensors), None):
        raise DamagedFileError(path, "its tensors do not match their checksum")
    return metadata


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
