"""Files of tensors: safetensors with metadata as JSON in one entry of the header, and a checksum of all of it."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cm3.common.checksums import KEY, NO_CHECKSUM, add_tensors_checksum, check_tensors
from cm3.common.errors import DamagedFileError
from cm3.common.files import atomic, file_error


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any], entry: str = "cm3"
) -> None:
    """Write tensors, and metadata as JSON in an `entry` of the header, atomically."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        if held.untyped_storage().data_ptr() in storages:
            held = held.clone()  # the format has no tensors that share memory
        storages.add(held.untyped_storage().data_ptr())
        stored[name] = held
    # One header entry only: the order of several is not fixed, and equal runs must give equal bytes.
    header = {entry: json.dumps(metadata | {KEY: NO_CHECKSUM}, allow_nan=False)}
    with atomic(path) as temporary:
        try:
            save_file(stored, temporary, header)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(temporary)) from error
        add_tensors_checksum(temporary)


def read_tensors(path: str | os.PathLike[str], entry: str = "cm3") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors, on the CPU, and metadata that `write_tensors` wrote; files of earlier releases have no checksum.

    Raises:
        DamagedFileError: a checksum differs, or the file is not readable.
        UserError: absent, a folder, or without permission.
    """
    tensors, metadata = open_tensors(path, entry)
    with _reading(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in tensors}, metadata


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a file on the CPU, by name, each read anew when it is asked for.

    Those of `read_tensors` are a map of the whole file, whose pages count as memory of this process once they are read. The
    map of one of these goes with the tensor.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str]) -> None:
        self._path, self._names = path, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with _reading(self._path), safe_open(self._path, "pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(path: str | os.PathLike[str], entry: str = "cm3") -> tuple[StoredTensors, dict[str, Any]]:
    """Check a file and return its tensors, not yet read, and its metadata; errors as `read_tensors`."""
    with _reading(path):
        checked = check_tensors(path)
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
    try:
        metadata = json.loads(header.get(entry, "{}"))
    except ValueError as error:
        raise DamagedFileError(path, f"its metadata are not JSON: {error}") from None
    if not isinstance(metadata, dict) or (KEY in metadata and not checked):
        raise DamagedFileError(path, "its metadata are altered")
    return StoredTensors(path, names), {name: value for name, value in metadata.items() if name != KEY}


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise file_error(path, error) from None
        raise DamagedFileError(path, str(error)) from None
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DamagedFileError(path, f"not a safetensors file: {error}") from None
