"""Training curves as TensorBoard event files."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Curves:
    """Writes each epoch's numbers to `folder`, for `tensorboard --logdir results`; None writes nothing."""

    def __init__(self, folder: Path | None, epoch: int = 1) -> None:
        """Continue at `epoch`: later epochs of a stopped run are hidden. At epoch 1 the folder is emptied."""
        self.writer: Any = None
        if folder is None:
            return
        if epoch == 1:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info(
                "no TensorBoard curves: the package tensorboard is not installed; history.csv has the same numbers"
            )
            return
        self.writer = SummaryWriter(str(folder), purge_step=epoch)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row of the history at its epoch."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(_tag(name), value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


def _tag(name: str) -> str:
    for prefix, group in (("valid_", "validation"), ("test_", "test"), ("stream_weight_", "stream weight")):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return f"training/{name}"
