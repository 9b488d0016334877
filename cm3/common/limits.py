"""CPU threads and memory of a job, for the libraries that take all of the machine by themselves: Arrow and DuckDB.

Snakemake sets OMP_NUM_THREADS and its like for OpenBLAS and OpenMP; `cm3.common.device.set_threads` is for torch.
"""

import os
from dataclasses import dataclass
from typing import Any

_LEAST_MB = 800
"""Memory with which DuckDB deduplicates hundreds of millions of rows, most of them on disk."""


@dataclass(frozen=True)
class Limits:
    """What one job may use; None: the workflow has not said.

    Attributes:
        threads: CPU threads.
        memory_mb: main memory in MB (10^6 bytes).
    """

    threads: int | None = None
    memory_mb: float | None = None

    def apply(self) -> None:
        """Set the thread pools of Arrow in this process, and OMP_NUM_THREADS of the processes that it starts."""
        if not self.threads:
            return
        import pyarrow as pa

        pa.set_cpu_count(self.threads)
        pa.set_io_thread_count(self.threads)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)

    def duckdb(self) -> dict[str, Any]:
        """Return the settings of a DuckDB database of this job.

        Memory: a quarter of the job's, because Python's tables need the rest, or 800 MB; never more than half of the job's.
        """
        memory: float = _LEAST_MB
        if self.memory_mb:
            memory = min(max(_LEAST_MB, self.memory_mb / 4), self.memory_mb / 2)
        threads = {"threads": self.threads} if self.threads else {}
        return {"memory_limit": f"{int(memory)}MB", **threads}
