"""What the workflow uses of Snakemake beyond its documented interface, in one place.

`tests/integration/test_snakemake_internals.py` runs each function under the installed Snakemake, and fails if one of them
no longer works.
"""

import os
import shutil
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snakemake.io import _IOFile

from cm3.common.ledger import Ledger

STATE = Path(".snakemake")
METADATA = Path("processed/.snakemake-metadata")
"""The folder of Snakemake's records: a JSON file for each output, with the parameters and inputs that made it."""
INCOMPLETE = Path("processed/.snakemake-incomplete")
"""The folder of Snakemake's marks of outputs whose job has started and not ended."""


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


def is_main_process(workflow: Any) -> bool:
    """Return whether this process plans the run; Snakemake reads the Snakefile again for some of its jobs."""
    return bool(workflow.is_main_process)


def extend_targets(workflow: Any, more: Callable[[Iterable[str]], list[str]]) -> None:
    """Add targets to those of the command line, or to the default one: what `more` returns for them.

    Snakemake reads the Snakefile before it knows its targets, and has no way to add to them later; so `_prepare_dag`, the
    first that reads them, is replaced by one that adds them before. Targets of jobs stay as they are.
    """
    prepare_dag = workflow._prepare_dag

    def prepare_with_more(*arguments: Any, **options: Any) -> Any:
        settings = workflow.dag_settings
        default = [workflow.default_target] if workflow.default_target else []
        targets = list(settings.targets) or default
        added = [] if settings.target_jobs else more(targets)
        if added:
            settings.targets = frozenset([*targets, *added])
        return prepare_dag(*arguments, **options)

    workflow._prepare_dag = prepare_with_more


def store_metadata_with_data() -> None:
    """Make Snakemake keep its records in `METADATA`, and the marks of unfinished outputs in `INCOMPLETE`.

    Snakemake always writes to `.snakemake/metadata` and `.snakemake/incomplete`; symbolic links there lead to the data.
    What is there already is moved. A fresh checkout next to the same raw/, processed/ and results/ then knows what is up
    to date, and which outputs a killed run left unfinished.
    """
    for name, target in (("metadata", METADATA), ("incomplete", INCOMPLETE)):
        _link_to(STATE / name, target)


def _link_to(link: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if link.is_dir():
        for record in sorted(link.rglob("*")):
            to = target / record.relative_to(link)
            if record.is_file() and not to.exists():
                to.parent.mkdir(parents=True, exist_ok=True)
                # A link may lead to another disk, where a file cannot be renamed to.
                shutil.move(record, to)
        link.rename(link.with_name(f"{link.name}-moved-{time.time_ns()}"))
    # An absolute path, because .snakemake itself can be a link to another disk.
    link.symlink_to(target.resolve(), target_is_directory=True)


def record_path(output: str) -> Path:
    """Return the file in `METADATA` that holds Snakemake's record of an output."""
    encoded = urlsafe_b64encode(output.encode()).decode()
    length = os.pathconf(METADATA, "PC_NAME_MAX") - 1
    parts = [encoded[start : start + length] for start in range(0, len(encoded), length)]
    return METADATA.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])


def compare_inputs_by_content(ledger: Ledger) -> None:
    """Make Snakemake compare every input with the content that a job recorded, whatever the times of the files.

    Snakemake compares the contents of inputs that are newer than the outputs alone, so that a file that was replaced by an
    older one goes unnoticed; and it reads each input once for each output of each job. Here every input is compared, and
    the ledger reads a file once.
    """
    newer_by_time, checksum_of_file = _IOFile.is_newer, _IOFile.checksum
    same_checksum = _IOFile.is_same_checksum
    by_time: dict[int, bool] = {}

    async def is_newer(file: Any, time: float) -> bool:
        by_time[id(file)] = newer = bool(await newer_by_time(file, time))
        return newer or (not file.is_storage and Path(file.file).is_file())

    async def is_same_checksum(file: Any, other: str | None, threshold: int | None, force: bool = False) -> bool:
        if other is None and id(file) in by_time:
            return not by_time[id(file)]  # no content is recorded, so the times decide
        return bool(await same_checksum(file, other, threshold, force))

    async def checksum(
        file: Any, threshold: int | None = None, force: bool = False, algorithm: Any = None
    ) -> str | None:
        local = not file.is_storage and algorithm in (None, "sha256") and Path(file.file).is_file()
        if local and (force or await file.is_checksum_eligible(threshold)):
            return f"sha256:{ledger.sha256(str(file))}"
        found: str | None = await checksum_of_file(file, threshold, force, algorithm)
        return found

    _IOFile.is_newer, _IOFile.is_same_checksum, _IOFile.checksum = is_newer, is_same_checksum, checksum
