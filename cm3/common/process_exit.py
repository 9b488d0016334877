"""The end of a stage's process without the interpreter's teardown, which takes half a second with torch and two with transformers.

Imported before anything else by `cm3.common.cli`: exit handlers run in reverse order, so that this one is the last of
those that come later.
"""

import atexit
import logging
import os
import sys

import psutil

_succeeded = False


def skip_teardown(module: str) -> None:
    """Let this process end at once, with status 0 and after its exit handlers, if it runs `module` (`python -m`)."""
    global _succeeded
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    _succeeded = spec is not None and spec.name == module


def _leave() -> None:
    # Handlers that were registered before this module end child processes; an error after the stage sets `last_type`.
    if not _succeeded or hasattr(sys, "last_type") or psutil.Process().children():
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


atexit.register(_leave)
