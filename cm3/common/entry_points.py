"""Parts of the pipeline from other installed packages, which announce them as entry points."""

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points

from cm3.common.errors import UserError


@functools.cache
def _announced(group: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((point.name, point.value, _distribution(point)) for point in entry_points(group=group))


def _distribution(point: object) -> str:
    found = getattr(point, "dist", None)
    return found.name if found is not None else "another package"


def with_entry_points(group: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return a registry, name -> "module:Class", with the entry points of a group after its own lines.

    No module is imported. The entry points are read once per process.

    Args:
        group: cm3.models or cm3.extractors.
        own: the lines of this package.

    Raises:
        UserError: two parts have the same name.
    """
    found = dict(own)
    for name, value, distribution in _announced(group):
        if found.get(name, value) != value:
            raise UserError(
                f"{distribution}: its entry point {name!r} of {group} has the name of another part, {found[name]}; rename it "
                "or uninstall the package"
            )
        found[name] = value
    return found
