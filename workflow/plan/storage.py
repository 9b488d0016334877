"""Where the plan's files lie for a job, when an object storage keeps them."""

from collections.abc import Mapping

from cm3.common.errors import UserError


def root_of(given: Mapping[str, str], planned: Mapping[str, str]) -> str:
    """Return what stands before the plan's paths in those that a job was given: the storage's folder, "." without one.

    Args:
        given: a job's input files by name, as its rule has them.
        planned: the plan's path of those whose root is asked for.

    Raises:
        UserError: files below different roots, or under other names.
    """
    root = None
    for name, path in planned.items():
        at = str(given[name])
        found = at.removesuffix(path)
        if not at.endswith(path) or root not in (None, found):
            raise UserError(
                f"{at}: is not {path} below the root of the other files; keep all of a study in one storage"
            )
        root = found
    return root or "."
