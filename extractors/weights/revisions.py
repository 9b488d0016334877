"""Commits of hub repositories without a configured revision: looked up once, recorded, and used from then on."""

import functools
import logging
import re
from pathlib import Path

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.files import exclusive, read_json, write_json
from cm3.common.http import hide_secrets
from extractors.weights.digests import cache_folder

COMMIT = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger(__name__)

DATA = Path("processed")
NAME = ".revisions.json"


def record_path() -> Path:
    """Return the file of commits by hub id: in processed/ if it exists, else in the user's cache."""
    return (DATA if DATA.is_dir() else cache_folder().parent) / NAME


def commit_of(repository: str, local_files_only: bool = False) -> str:
    """Return the commit of a hub repository without a configured revision, the same in every run.

    The first call asks the hub, or uses an earlier download; later calls read the record and import no library.

    Raises:
        UserError: the hub cannot be reached and nothing was downloaded before.
    """
    record = record_path()
    commit = _recorded(record).get(repository)
    if commit is None:
        commit = _found(repository, local_files_only)
        with exclusive(record.with_name(f"{NAME}.lock")):
            commits = _recorded(record)
            commit = commits.setdefault(repository, commit)
            write_json(record, dict(sorted(commits.items())), checksum=False)
    warn_once(repository, commit, record.absolute())
    return commit


def _recorded(record: Path) -> dict[str, str]:
    if not record.exists():
        return {}
    try:
        commits = dict(read_json(record))
    except (DamagedFileError, ValueError, TypeError):
        commits = {"": None}
    if not all(isinstance(commit, str) and COMMIT.fullmatch(commit) for commit in commits.values()):
        raise UserError(f"{record}: not a JSON object of hub ids and their commits; correct it, or delete it")
    return commits


def _found(repository: str, local_files_only: bool) -> str:
    from huggingface_hub import HfApi, snapshot_download

    reason = "local_files_only is set"
    if not local_files_only:
        try:
            commit = HfApi().model_info(repository).sha
            if commit is not None:
                return commit
            reason = "the hub names no commit"
        except Exception as error:  # the hub client raises errors of many libraries; all mean: no answer
            reason = f"{type(error).__name__}: {hide_secrets(str(error).strip().partition(chr(10))[0])}"
    try:
        # The folder of the newest download is named after its commit.
        return Path(snapshot_download(repository, local_files_only=True)).name
    except Exception as error:
        raise UserError(
            f"{repository}: no revision is set, the hub cannot be asked for the newest ({reason}), and nothing was "
            "downloaded before. Set revision to a commit (40 hex digits; the model's page lists them under "
            "'Files and versions' > 'History'), or weights to a local folder"
        ) from error


@functools.cache
def warn_once(repository: str, commit: str, record: Path) -> None:
    log.warning(
        "%s has no revision in the config; using %s, as recorded in %s. Pin it, so that it is the same everywhere: "
        "revision: %s",
        repository,
        commit,
        record,
        commit,
    )
