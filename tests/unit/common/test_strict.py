"""Messages about a faulty config section."""

from typing import Literal

import pytest

from cm3.common.errors import UserError
from cm3.common.strict import Strict, validate


class Part(Strict):
    size: int = 1


class Section(Strict):
    count: int | Literal["auto"] = "auto"
    part: Part | str = "none"
    parts: dict[str, list[Part | int]] | None = None
    name: str


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": "none"}, "s.count = 'none': Input should be a valid integer or 'auto'"),
        ({"count": {"int": 3}}, "s.count = {'int': 3}: Input should be a valid integer or 'auto'"),
        ({"part": {"size": "x"}}, "s.part.size = 'x': Input should be a valid integer"),
        ({"part": {"sizes": 2}}, "s.part.sizes: unknown key (did you mean 'size'?)"),
        ({"parts": {"a": [1, {"size": None}]}}, "s.parts.a.1.size = None: Input should be a valid integer"),
        ({"other": 1}, "s.other: unknown key"),
        ({"name": 3}, "s.name = 3: Input should be a valid string"),
    ],
)
def test_a_place_has_the_keys_that_the_user_wrote_and_all_alternatives_on_one_line(given, message):
    with pytest.raises(UserError) as found:
        validate(Section, {"name": "x"} | given, "s")
    lines = str(found.value).splitlines()
    assert lines[0].startswith(message)
    assert len([line for line in lines if line.startswith(message.partition(":")[0])]) == 1
    assert not any(word in str(found.value) for word in ("Part.", ".int", "literal", "constrained"))


def test_what_is_absent_is_told():
    with pytest.raises(UserError, match=r"^s\.name: required, but not given$"):
        validate(Section, {}, "s")
