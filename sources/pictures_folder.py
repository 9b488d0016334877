"""Finder of pictures in a local folder, by a pattern of the item id or by the item's own image column."""

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sources.finding import Found, Wanted
from stages.errors import UserError
from stages.paths import expand
from stages.tables import FAILED, MISSING


def find(
    wanted: Sequence[Wanted], spec: dict[str, Any], runtime: dict[str, Any], inputs: dict[str, Path], downloads: Path
) -> Iterator[Found]:
    """Yield where each item's picture lies; never a file outside the folder, whatever an id or a column says.

    Raises:
        UserError: the folder does not exist.
    """
    folder = Path(expand(spec["folder"])) if spec["folder"] else inputs["pictures"].parent / "images"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set the data set's images.folder to where the pictures are")
    real = folder.resolve()
    for item in wanted:
        if spec["patterns"] is None:
            names = list(item.references)
        else:
            names = [pattern.format(item_id=item.item_id) for pattern in spec["patterns"]]
        yield _first(folder, real, names)


def _first(folder: Path, real: Path, names: Sequence[str]) -> Found:
    absent = ""
    for name in names:
        path = folder / name
        if "://" in name:
            return Found(None, name, FAILED, "is a URL, but images.folder is set, so nothing is fetched")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return Found(None, name, FAILED, "refused: the path leads out of the folder")
        try:
            kind = path.stat().st_mode
            if not path.resolve().is_relative_to(real):
                return Found(None, str(path), FAILED, "refused: a link leads out of the folder")
        except FileNotFoundError:
            absent = absent or str(path)
            continue
        except (OSError, ValueError) as error:
            return Found(None, str(path), FAILED, f"cannot be read: {error}")
        if not stat.S_ISREG(kind):
            return Found(None, str(path), FAILED, "not a regular file")
        return Found(path, str(path))
    return Found(None, absent, MISSING, "no such file" if absent else "the item names no picture")
