"""Files that the user names: a folder, a link to nothing and a file without permission are told apart in one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from cm3.common.errors import UserError
from cm3.common.input_files import check_readable, unreadable


def test_a_file_is_readable(tmp_path: Path):
    (tmp_path / "x.csv").write_text("user,item\n")
    (tmp_path / "link.csv").symlink_to("x.csv")
    assert unreadable(tmp_path / "x.csv") == unreadable(tmp_path / "link.csv") == ""
    check_readable(tmp_path / "x.csv")


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "link.csv").symlink_to("absent.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for name, complaint in (
        ("absent.csv", "no such file"),
        ("link.csv", "a link to a file that does not exist"),
        ("pipe.csv", "is not a regular file"),
        ("", "is a folder, not a file"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            check_readable(tmp_path / name, "datasets.shop.interactions.path")
        assert str(error.value).startswith(f"datasets.shop.interactions.path = {str(tmp_path / name)!r}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError):
    path = tmp_path / "x.csv"
    path.touch()

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"x\.csv: cannot be read \({error.strerror}\); check its permissions"):
        check_readable(path)
