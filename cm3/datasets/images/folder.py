"""Image source `folder`: local files, found by a pattern of the item id or by the item's own image column."""

import errno
import itertools
import logging
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

log = logging.getLogger("cm3.datasets.images.folder")

_AT_ONCE = 64
_FAULTS_OF_A_NAME = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.EISDIR})
_ABSENT = ("no such file",)
_LINK = (
    "refused: a link leads out of the folder; if it leads into a store (DVC, git-annex, the hub's cache), set "
    "images.follow_links: true"
)
_POINTERS = {
    b"version https://git-lfs.github.com/": "a pointer of Git LFS in place of the file; run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex in place of the file; run `git annex get`",
}
"""First bytes of the small texts that a checkout has in place of large files, and what to do."""
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
    absent: list[str] = []
    with ThreadPoolExecutor(search.runtime.get("threads")) as pool:
        while block := list(itertools.islice(items, _AT_ONCE)):
            for found in pool.map(look, block):
                if found.kinds == _ABSENT:
                    absent.append(found.url)
                yield found
    if len(absent) * 2 > len(search.wanted):
        log.warning(
            "%d of %d items have no file, such as %s; %s: correct images.pattern, or the names in the image column",
            len(absent),
            len(search.wanted),
            absent[0],
            _examples(folder),
        )


def _examples(folder: Path) -> str:
    """Return "the folder has a.JPG, b.JPG, c.JPG" with the first files in a folder, those in its subfolders included."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    names = sorted(str(path.relative_to(folder)) for path in itertools.islice(files, 3))
    return f"the folder has {', '.join(names)}" if names else "the folder has no files"


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
        if pointer := next((advice for start, advice in _POINTERS.items() if data.startswith(start)), None):
            raise UnreadableError("a pointer in place of the file", pointer)
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
