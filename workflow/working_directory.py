"""One Snakemake run: its lock on the working directory, and the environment that its jobs inherit."""

import fcntl
import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO

from cm3.common.errors import UserError

FOLDERS = (Path("processed"), Path("results"))
"""The folders that runs write to. Checkouts can share one through a symbolic link, so the locks are in them."""
LOCK = ".run.lock"


class RunLock:
    """Lock that allows one run at a time in the folders of the data. The kernel releases it when its holder is killed."""

    def __init__(self) -> None:
        self.since = time.time()
        self._files: list[TextIO] = []

    def acquire(self) -> None:
        """Hold the lock until this process ends.

        Raises:
            UserError: another run holds it; the message has its process id and folder.
        """
        for folder in FOLDERS:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another run ({file.read().strip() or 'unknown'}) works in {folder.resolve()}; wait for it to end, or "
                    "stop it"
                ) from None
            except OSError as error:
                print(
                    f"WARNING: {folder}: runs cannot be locked here ({error.strerror}); start one at a time",
                    file=sys.stderr,
                )
            else:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}, started in {Path.cwd()}")
                file.flush()
            self._files.append(file)
        self.since = time.time()


def set_job_environment(root: Path) -> None:
    """Make jobs use the interpreter of Snakemake and the packages in `root`, and stop when Snakemake stops."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    os.environ["CM3_STOP_WITH_PARENT"] = "1"
    # Threads that spin at barriers slow down other jobs; threads that sleep at once are slow to wake up. A short spin is
    # nearly as fast as a long one on an idle machine, and as none on a busy one (benchmarks/RESULTS.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # torch asks for pages of 2 MB where Linux has them: a step of training touches thousands of new pages of 4 kB otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def log_to_files_only() -> None:
    """Make stages that have a log file write to it alone, because the terminal shows a line for each job."""
    os.environ["CM3_LOG_TO_FILE"] = "1"
