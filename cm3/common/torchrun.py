"""The environment variables of a process that torchrun started. Does not import torch."""

import os


def started_by_torchrun() -> bool:
    """Return whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def torchrun_rank() -> int:
    """Return the number of this process among those that torchrun started, from 0; 0 for a process on its own."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0
