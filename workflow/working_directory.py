"""What one Snakemake invocation holds: the lock on the working directory, and the place of its metadata."""

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from cm3.common.errors import UserError

SNAKEMAKE = Path(".snakemake")
METADATA = Path("processed/.snakemake-metadata")


class RunLock:
    """One run at a time per working directory. Unlike a lock file, it is gone when its holder is killed."""

    def __init__(self) -> None:
        self.since = time.time()
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock for as long as this process lives.

        Raises:
            UserError: another run holds it; names its process id.
        """
        SNAKEMAKE.mkdir(exist_ok=True)
        file = (SNAKEMAKE / "run.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another run (process {file.read().strip() or 'unknown'}) works in {Path.cwd()}; "
                "wait for it to end, or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        self.since = time.time()


def lend_environment_to_jobs(root: Path) -> None:
    """Let jobs run with the interpreter that runs Snakemake and this checkout's packages, and end with Snakemake."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    os.environ["CM3_STOP_WITH_PARENT"] = "1"
    # Threads that spin at barriers take the cores from other jobs, threads that sleep at once are slow to wake: a short
    # spin has nearly the speed of a long one on an idle machine, and of none on a busy one (benchmarks/RESULTS.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_metadata_with_data() -> None:
    """Let Snakemake's records of how files were made lie beside those files, under processed/.

    They then move with the data: a fresh checkout beside the same raw/, processed/ and results/ knows what is up to
    date, and what an edit of config or code makes stale.
    """
    link = SNAKEMAKE / "metadata"
    if link.is_symlink() and METADATA.is_dir():
        return
    METADATA.mkdir(parents=True, exist_ok=True)
    # Snakemake takes a metadata folder without this one for its older layout, and migrates it.
    (SNAKEMAKE / "incomplete").mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if link.is_dir():
        for record in sorted(link.rglob("*")):
            target = METADATA / record.relative_to(link)
            if record.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                record.replace(target)
        link.rename(SNAKEMAKE / f"metadata-moved-{time.time_ns()}")
    link.symlink_to(os.path.relpath(METADATA, SNAKEMAKE), target_is_directory=True)
