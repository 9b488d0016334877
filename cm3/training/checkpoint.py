"""One checkpoint file: tensors and, in its header, the loop's state as JSON. Never a pickle."""

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
    """The last state of a run, in `folder`/last.safetensors, tied to what it was computed from."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Take the folder and a digest of settings, code and inputs: a state of another digest is never resumed."""
        self.path = folder / "last.safetensors"
        self.fingerprint = fingerprint

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint, atomically: after a kill it is either the old one or the new one."""
        header = {"state": json.dumps({"fingerprint": self.fingerprint, **state}, allow_nan=False)}
        with atomic(self.path) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors (on the CPU) and the state, or None where there is no checkpoint of this fingerprint."""
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if state.pop("fingerprint") != self.fingerprint:
                    log.warning("%s: of other settings, code or inputs; starting afresh", self.path)
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("%s: unreadable (%s); starting afresh", self.path, error)
            return None

    def kept(self) -> str:
        """Say where the last state lies, as a sentence with a space behind it; nothing where there is none."""
        return f"The last good state is kept in {self.path}. " if self.path.exists() else ""

    def remove(self) -> None:
        """Delete the checkpoint, what a killed writer left beside it, and the folder."""
        with contextlib.suppress(OSError):
            for file in self.path.parent.glob(f"*{self.path.name}*"):
                file.unlink()
            self.path.parent.rmdir()


class Unkept(Checkpoint):
    """A checkpoint that nobody keeps, for training that is not meant to be resumed."""

    def __init__(self) -> None:
        super().__init__(Path(), "")

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep nothing."""

    def load(self) -> None:
        """Return None: nothing is kept."""

    def kept(self) -> str:
        """Return nothing."""
        return ""

    def remove(self) -> None:
        """Do nothing."""
