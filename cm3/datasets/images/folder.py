"""Image source `folder`: local files, found by a pattern of the item id or by the item's own image column."""

import errno
import itertools
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cm3.common.errors import UserError, machine_fault
from cm3.common.files import file_error
from cm3.common.http import one_line
from cm3.common.image_decode import UnreadableError
from cm3.common.paths import expand
from cm3.common.tables import FAILED, MISSING, OK
from cm3.datasets.images.source import Found, Search, Wanted
from cm3.datasets.images.validate import PlaceholderError, examine

_AT_ONCE = 64
_FAULTS_OF_A_NAME = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.EISDIR})
_ABSENT = ("no such file",)
_LINK = (
    "refused: a link leads out of the folder; if it leads into a store (DVC, git-annex, the hub's cache), set "
    "images.follow_links: true"
)
_NONE = Found("", MISSING, ("the item names no image",), ("the item names no image",))


def find(search: Search) -> Iterator[Found]:
    """Yield each item's image. An id or a column never leads out of the folder; a link does only with `follow_links`.

    Raises:
        UserError: the folder does not exist, or a file cannot be read for a reason that is not in the file.
    """
    spec = search.spec
    folder = Path(expand(spec["folder"])) if spec["folder"] else search.inputs["images"].parent / "images"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set images.folder of the data set to the folder of the images")
    items = iter(search.wanted)
    look = partial(_look, folder, folder.resolve(), spec)
    # Threads, because Pillow's decoders release the GIL; in blocks, to have few images in memory.
    with ThreadPoolExecutor(search.runtime.get("threads")) as pool:
        while block := list(itertools.islice(items, _AT_ONCE)):
            yield from pool.map(look, block)


def _look(folder: Path, real: Path, spec: dict[str, Any], item: Wanted) -> Found:
    names = item.references
    if spec["patterns"] is not None:
        names = [pattern.format(item_id=item.item_id) for pattern in spec["patterns"]]
    bad: list[Found] = []
    for name in names:
        found = _try(folder, real, spec, name)
        if found.status == OK:
            return found
        bad.append(found)
    # The first that failed, or else a placeholder, is more informative than a file that does not exist.
    return min(bad, key=lambda found: (found.status != FAILED, found.kinds == _ABSENT), default=_NONE)


def _try(folder: Path, real: Path, spec: dict[str, Any], name: str) -> Found:
    path = folder / name
    if "://" in name:
        return _refused(name, "is a URL, but images.folder is set, so nothing is fetched")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return _refused(name, "refused: the path leads out of the folder")
    try:
        kind = path.stat().st_mode
        if not spec.get("follow_links") and not path.resolve().is_relative_to(real):
            return _refused(path, _LINK)
        if not stat.S_ISREG(kind):
            return _refused(path, "not a regular file")
        data = _read(path, spec["max_bytes"])
        return Found(str(path), OK, (), (), examine(data, spec["max_pixels"], spec.get("placeholders", ())), data)
    except (FileNotFoundError, NotADirectoryError):
        return Found(str(path), MISSING, _ABSENT, _ABSENT)
    except UnreadableError as error:
        status = MISSING if isinstance(error, PlaceholderError) else FAILED
        return Found(str(path), status, (one_line(str(error)),), (error.kind,))
    except MemoryError as error:
        raise machine_fault(error, f"reading {path}") or error from error
    except OSError as error:
        if error.errno not in _FAULTS_OF_A_NAME:  # a disk, a limit of the machine, a permission
            raise machine_fault(error, f"reading {path}") or file_error(path, error) from error
        return _unreadable(path, error)
    except ValueError as error:  # a name with a zero byte
        return _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> Found:
    return Found(str(path), FAILED, (one_line(f"cannot be read: {error}"),), ("cannot be read",))


def _refused(name: str | Path, reason: str) -> Found:
    return Found(str(name), FAILED, (reason,), (reason,))


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableError("too many bytes", f"more than the {max_bytes} bytes allowed")
    return data
