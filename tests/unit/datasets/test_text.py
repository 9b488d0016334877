"""Plain text from HTML of shop pages, in linear time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.datasets.text import CUT_TAG, plain_text

SLOW_CUT_TAG = re.compile(r"</?[a-zA-Z][\w-]*\s[^<>]*=[^<>]*\Z|\A[^<>]*\"\s*/>")


@settings(deadline=None, max_examples=1000)
@given(st.text('<>a/ ="-\n', max_size=14))
def test_the_linear_expression_finds_the_same_cut_tags(shown: str):
    assert CUT_TAG.sub("|", shown) == SLOW_CUT_TAG.sub("|", shown)


@given(st.text(st.characters(), max_size=40))
def test_plain_text_is_one_line_of_unicode(shown: str):
    found = plain_text(shown)
    assert found.encode().decode() == found == " ".join(found.split())


@pytest.mark.parametrize(
    "hostile",
    [
        "<a " + "=" * 40_000 + "<",
        "<a =" * 100_000 + "<",
        '" ' * 150_000,
        '"' + " " * 300_000 + "/<",
        "<!--" * 80_000,
        "<script </script " * 20_000,
    ],
)
def test_no_text_takes_long(hostile: str):
    started = time.process_time()
    plain_text(hostile)
    assert time.process_time() - started < 5
