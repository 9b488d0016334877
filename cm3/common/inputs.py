"""Checks of a stage's inputs: each was made for what was asked, and none changes while the stage runs."""

from collections.abc import Mapping
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.tables import MADE_FROM, read_metadata


def check_made_from(path: Path, expected: Mapping[str, str]) -> None:
    """Compare the settings that a table was made from with those of the configuration.

    Tables of release 0.1.0 do not say what they were made from, and pass.

    Args:
        path: a Parquet table with `MADE_FROM` in its metadata.
        expected: stage -> key of its settings.

    Raises:
        UserError: the table was made from other settings.
    """
    found = read_metadata(path).get(MADE_FROM)
    if found is None:
        return
    other = [stage for stage in expected if found.get(stage) != expected[stage]]
    if other:
        raise UserError(
            f"{path}: was made with other settings of {' and '.join(other)} than those of this run "
            f"({', '.join(f'{stage} {found.get(stage)}, expected {expected[stage]}' for stage in other)}), perhaps by another "
            "checkout that uses the same folder. Run the same command again, which makes it anew, or give each checkout a "
            "processed/ of its own"
        )


class Watch:
    """The inputs of a stage as they were when it started."""

    def __init__(self, inputs: Mapping[str, Path]) -> None:
        self._stamps = {path: _stamp(path) for path in inputs.values()}

    def check(self) -> None:
        """Compare the inputs with what they were.

        Raises:
            UserError: a file was replaced, changed or removed since.
        """
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise UserError(
                    f"{path}: was changed while this stage read it, so its results are not kept; let no other program write "
                    "to it, and run the same command again"
                )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    if not path.is_file():
        return (status.st_ino,)  # the times of a folder change with any file in it
    return (status.st_size, status.st_mtime_ns, status.st_ino)
