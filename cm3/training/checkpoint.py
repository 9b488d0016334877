"""Checkpoints: one safetensors file with the tensors, and the loop's state as JSON in its header."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cm3.common.files import atomic

log = logging.getLogger(__name__)


class Checkpoint:
    """The last state of a run, in `folder`/last.safetensors, with the fingerprint of its settings, code and inputs."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Take the folder and a digest of settings, code and inputs; a state with another digest is never loaded."""
        self.path = folder / "last.safetensors"
        self.fingerprint = fingerprint

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        header = {"state": json.dumps({"fingerprint": self.fingerprint, **state}, allow_nan=False)}
        with atomic(self.path) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors (on the CPU) and the state, or None where there is no checkpoint of this fingerprint."""
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if state.pop("fingerprint") != self.fingerprint:
                    log.warning("%s: other settings, code or inputs; starting from the beginning", self.path)
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("%s: unreadable (%s); starting from the beginning", self.path, error)
            return None

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
