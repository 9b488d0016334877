"""Checkpoints: the last state of a run with the loop's state as JSON in its header, and its best epoch, as safetensors."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.tensors import open_tensors, read_tensors, write_tensors

log = logging.getLogger(__name__)

_ENTRY = "state"


class Checkpoint:
    """The last state of a run, in `folder`/last.safetensors, with the fingerprint of its settings, code and inputs.

    Parameters and embeddings of the best epoch are in `folder`/best-EPOCH.safetensors and not in memory.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Take the folder and a digest of settings, code and inputs; a state with another digest is never loaded."""
        self.path = folder / "last.safetensors"
        self.fingerprint = fingerprint
        self._needed: int | None = None  # best epoch of the state in the file

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, **state}, _ENTRY)
        self._needed = _best_epoch(state)
        self._remove_best(except_for={self._needed})

    def save_best(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of the best epoch so far."""
        write_tensors(self._best(epoch), dict(tensors), {"fingerprint": self.fingerprint}, _ENTRY)
        self._remove_best(except_for={epoch, self._needed})

    def load_best(self, epoch: int) -> dict[str, Tensor]:
        """Return the tensors of the best epoch, on the CPU.

        Raises:
            DamagedFileError: the file is damaged.
            UserError: there is none.
        """
        return read_tensors(self._best(epoch), _ENTRY)[0]

    def _best(self, epoch: int) -> Path:
        return self.path.with_name(f"best-{epoch}.safetensors")

    def _remove_best(self, except_for: set[int | None]) -> None:
        kept = {self._best(epoch) for epoch in except_for if epoch is not None}
        for file in self.path.parent.glob("best-*.safetensors"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def load(self) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors, on the CPU, and the state, or None where there is no checkpoint of this fingerprint.

        Each tensor is read when it is asked for.

        A damaged checkpoint is removed with a warning.

        Raises:
            UserError: without permission, or a folder is in its place.
        """
        if not self.path.exists():
            return None
        try:
            tensors, state = open_tensors(self.path, _ENTRY)
        except DamagedFileError as error:
            log.warning("%s: damaged (%s); removed, starting from the beginning", self.path, error.reason)
            self.path.unlink(missing_ok=True)
            return None
        if state.pop("fingerprint", None) != self.fingerprint:
            log.warning("%s: other settings, code or inputs; starting from the beginning", self.path)
            return None
        self._needed = _best_epoch(state)
        if self._needed is not None:
            try:
                self.load_best(self._needed)
            except UserError as error:
                log.warning("%s; starting from the beginning", error)
                return None
        return tensors, state

    def location_note(self) -> str:
        """Return a sentence with the path of the last state and a trailing space; empty where there is none."""
        return f"The last good state is in {self.path}. " if self.path.exists() else ""

    def remove(self) -> None:
        """Delete the checkpoint, temporary files of a killed writer, and the folder."""
        with contextlib.suppress(OSError):
            for pattern in (f"*{self.path.name}*", "*best-*.safetensors*"):
                for file in self.path.parent.glob(pattern):
                    file.unlink()
            self.path.parent.rmdir()


def _best_epoch(state: Mapping[str, Any]) -> int | None:
    best = state.get("best") or {}
    return None if best.get("valid") is None else best["epoch"]


class NullCheckpoint(Checkpoint):
    """A checkpoint that stores no state, for training that is not resumed, and has the best epoch in memory."""

    def __init__(self) -> None:
        super().__init__(Path(), "")
        self._tensors: dict[str, Tensor] = {}

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Do nothing."""

    def save_best(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of the tensors."""
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def load_best(self, epoch: int) -> dict[str, Tensor]:
        """Return the copies."""
        return self._tensors

    def load(self) -> None:
        """Return None: nothing is stored."""

    def location_note(self) -> str:
        """Return an empty string."""
        return ""

    def remove(self) -> None:
        """Do nothing."""
