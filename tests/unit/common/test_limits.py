"""Arrow and DuckDB use the threads and the memory that a job was given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from cm3.common.limits import Limits
from cm3.datasets.interactions_db import InteractionsDatabase

STAGE = """
import json, os
from pathlib import Path
import pyarrow as pa
from cm3.common.cli import stage
from cm3.datasets.interactions_db import InteractionsDatabase
with stage("demo") as call, InteractionsDatabase(Path("data"), call.limits) as database:
    threads, memory = database.base.execute("select current_setting('threads'), current_setting('memory_limit')").fetchone()
    arrow = [pa.cpu_count(), pa.io_thread_count()]
    print(json.dumps({"duckdb": threads, "memory": memory, "arrow": arrow, "runtime": call.runtime}))
"""


def facts_of_a_job(folder: Path, runtime: dict[str, object]) -> dict[str, object]:
    command = [sys.executable, "-c", STAGE, "--runtime", json.dumps(runtime)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_a_job_runs_arrow_and_duckdb_with_its_threads(tmp_path: Path, threads: int):
    facts = facts_of_a_job(tmp_path, {"threads": threads, "mem_mb": 8000})
    assert facts["duckdb"] == threads and facts["arrow"] == [threads, threads]
    assert facts["memory"] == "1.8 GiB"  # a quarter of 8000 MB
    assert facts["runtime"] == {"threads": threads}, "stages have no such setting"


def test_memory_of_a_database_is_that_of_a_small_job_or_its_quarter(tmp_path: Path):
    limits = [Limits(memory_mb=memory).duckdb()["memory_limit"] for memory in (None, 1000, 1500, 3000, 40_000)]
    assert limits == ["800MB", "500MB", "750MB", "800MB", "10000MB"]
    with InteractionsDatabase(tmp_path, Limits(2, 1000)) as database:
        assert database.base.execute("select current_setting('threads')").fetchone() == (2,)
