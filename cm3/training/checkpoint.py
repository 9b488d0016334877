"""Checkpoints: one safetensors file with the tensors, and the loop's state as JSON in its header."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from cm3.common.errors import DamagedFileError
from cm3.common.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

_ENTRY = "state"


class Checkpoint:
    """The last state of a run, in `folder`/last.safetensors, with the fingerprint of its settings, code and inputs."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Take the folder and a digest of settings, code and inputs; a state with another digest is never loaded."""
        self.path = folder / "last.safetensors"
        self.fingerprint = fingerprint

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, **state}, _ENTRY)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors (on the CPU) and the state, or None where there is no checkpoint of this fingerprint.

        A damaged checkpoint is removed with a warning.

        Raises:
            UserError: without permission, or a folder is in its place.
        """
        if not self.path.exists():
            return None
        try:
            tensors, state = read_tensors(self.path, _ENTRY)
        except DamagedFileError as error:
            log.warning("%s: damaged (%s); removed, starting from the beginning", self.path, error.reason)
            self.path.unlink(missing_ok=True)
            return None
        if state.pop("fingerprint", None) != self.fingerprint:
            log.warning("%s: other settings, code or inputs; starting from the beginning", self.path)
            return None
        return tensors, state

    def location_note(self) -> str:
        """Return a sentence with the path of the last state and a trailing space; empty where there is none."""
        return f"The last good state is in {self.path}. " if self.path.exists() else ""

    def remove(self) -> None:
        """Delete the checkpoint, temporary files of a killed writer, and the folder."""
        with contextlib.suppress(OSError):
            for file in self.path.parent.glob(f"*{self.path.name}*"):
                file.unlink()
            self.path.parent.rmdir()


class NullCheckpoint(Checkpoint):
    """A checkpoint that stores nothing, for training that is not resumed."""

    def __init__(self) -> None:
        super().__init__(Path(), "")

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Do nothing."""

    def load(self) -> None:
        """Return None: nothing is stored."""

    def location_note(self) -> str:
        """Return an empty string."""
        return ""

    def remove(self) -> None:
        """Do nothing."""
