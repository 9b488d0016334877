"""Root folder of a job's files if they are in an object storage."""

from collections.abc import Mapping

from cm3.common.errors import UserError


def root_of(given: Mapping[str, str], planned: Mapping[str, str]) -> str:
    """Return the prefix of a job's paths before the planned paths: the folder of the storage, "." without a storage.

    Args:
        given: input files of the job by name.
        planned: their paths without a storage; all are among `given`.

    Raises:
        UserError: the files are below different roots or have other paths.
    """
    root = None
    for name, path in planned.items():
        at = str(given[name])
        found = at.removesuffix(path)
        if not at.endswith(path) or root not in (None, found):
            raise UserError(
                f"{at}: is not {path} below the root of the other files; store all files of a study in one storage"
            )
        root = found
    return root or "."
