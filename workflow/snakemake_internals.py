"""What the workflow uses of Snakemake beyond its documented interface, in one place.

`tests/integration/test_snakemake_internals.py` runs each function under the installed Snakemake, and fails if one of them
no longer works.
"""

import os
import time
from pathlib import Path
from typing import Any

STATE = Path(".snakemake")
METADATA = Path("processed/.snakemake-metadata")
"""The folder of Snakemake's records: a JSON file for each output, with the parameters and inputs that made it."""


def config_files(workflow: Any) -> list[Path]:
    """Return the files that `--configfile` names."""
    return [Path(path) for path in workflow.overwrite_configfiles]


def literal_path(path: str) -> str:
    """Return an input path that Snakemake uses as it is: `{2020}` in it is not a wildcard.

    Snakemake has no way to write a brace in a path. It applies wildcards also to the paths that input functions return, so
    `_IOFile.apply_wildcards` is replaced by one that leaves the paths of this function alone.
    """
    if "{" not in path:
        return path
    from snakemake import io

    apply_wildcards = io._IOFile.apply_wildcards
    if not hasattr(apply_wildcards, "keeps_literal"):

        def keep_literal(file: Any, wildcards: Any) -> Any:
            return file if io.is_flagged(file, "literal") else apply_wildcards(file, wildcards)

        keep_literal.keeps_literal = True  # type: ignore[attr-defined]
        io._IOFile.apply_wildcards = keep_literal
    flagged: str = io.flag(path, "literal")
    return flagged


def has_local_files(workflow: Any) -> bool:
    """Return whether the files of the workflow are on this machine, not in an object storage."""
    return workflow.storage_settings.default_storage_provider is None


def runs_elsewhere(workflow: Any) -> bool:
    """Return whether jobs run on other machines (a cluster), or not at all (a dry run)."""
    return bool(workflow.non_local_exec_or_dryrun)


def resource_limit(workflow: Any, name: str) -> int | None:
    """Return how much of a resource jobs can use at a time: "_cores", or a name of `--resources`; None without a limit."""
    limits = workflow.global_resources
    return limits[name].value if name in limits else None


def store_metadata_with_data() -> None:
    """Make Snakemake keep its records in `METADATA`, so that they move with the data.

    Snakemake always writes to `.snakemake/metadata`; a symbolic link there leads to `METADATA`. Records that are there
    already are moved. A fresh checkout next to the same raw/, processed/ and results/ then knows what is up to date.
    """
    link = STATE / "metadata"
    if link.is_symlink() and METADATA.is_dir():
        return
    METADATA.mkdir(parents=True, exist_ok=True)
    # Snakemake takes a metadata folder without this one for its older layout, and migrates it.
    (STATE / "incomplete").mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if link.is_dir():
        for record in sorted(link.rglob("*")):
            target = METADATA / record.relative_to(link)
            if record.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                record.replace(target)
        link.rename(STATE / f"metadata-moved-{time.time_ns()}")
    link.symlink_to(os.path.relpath(METADATA, STATE), target_is_directory=True)
