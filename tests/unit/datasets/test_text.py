"""Cleaning of shop texts: what goes, what stays, and that no text takes long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.datasets import text
from cm3.datasets.text import plain_text

CUT_TAG = re.compile(r"</?[a-zA-Z][\w-]*\s[^<>]*=[^<>]*\Z|\A[^<>]*\"\s*/>")


@settings(deadline=None, max_examples=1000)
@given(st.text('<>a/ ="-\n', max_size=14))
def test_half_a_tag_is_what_it_was(shown: str):
    assert text._CUT_TAG.sub("|", shown) == CUT_TAG.sub("|", shown)


@given(st.text(st.characters(), max_size=40))
def test_what_is_clean_can_be_written_on_one_line(shown: str):
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
    assert time.process_time() - started < 2
