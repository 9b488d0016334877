"""Ids from columns and values of every type: text, integers and whole floats; missing ids are found, others refused."""

import datetime
import re
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cm3.common.ids import MISSING_TEXTS, id_column, id_text, is_index, missing_id
from cm3.common.values import InvalidValueError, plain_column, without_views

TEXT = ["a", "bé", "c"]
BYTES = [text.encode() for text in TEXT]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXT),
        pa.array(TEXT, pa.large_string()),
        pa.array(TEXT, pa.string_view()),
        pa.array(TEXT).dictionary_encode(),
        pa.array(TEXT, pa.large_string()).dictionary_encode(),
        pa.array(BYTES),
        pa.array(BYTES, pa.large_binary()),
        pa.array(BYTES, pa.binary_view()),
        pa.array(BYTES).dictionary_encode(),
        pa.chunked_array([TEXT[:1], TEXT[1:]]),
        pa.Array.from_pandas(pd.Series(pd.Categorical(TEXT, categories=["unused", *TEXT]))),
        pa.Array.from_pandas(pd.Series(TEXT, dtype="string")),
    ],
    ids=lambda column: str(column.type),
)
def test_text_is_read_however_it_is_stored(column: Any):
    ids, missing = id_column(column)
    assert ids.to_pylist() == TEXT and not missing.any()


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([7, None, 2**63 - 1]), ["7", None, str(2**63 - 1)]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([7.0, float("nan"), -0.0, 1e15]), ["7", None, "0", str(10**15)]),
        (pa.array([7.0, None], pa.float32()), ["7", None]),
        (pa.array(np.asarray([7.0], np.float16)), ["7"]),
        (pa.array([Decimal("7.00"), None]), ["7", None]),
        (pa.array([Decimal(10**30)]), [str(10**30)]),
        (pa.array([1, 2], pa.int8()).dictionary_encode(), ["1", "2"]),
        (pa.array([UUID(int=5).bytes], pa.uuid()), [str(UUID(int=5))]),
        (pa.Array.from_pandas(pd.Series([1, None], dtype="Int64")), ["1", None]),
        (pa.nulls(2), [None, None]),
        (pa.nulls(1, pa.struct([("a", pa.string())])), [None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_whole_numbers_are_their_digits(column: Any, expected: list[str | None]):
    ids, missing = id_column(column)
    assert [None if absent else text for text, absent in zip(ids.to_pylist(), missing, strict=True)] == expected


@pytest.mark.parametrize("text", ["", " ", "\t", *MISSING_TEXTS])
def test_a_missing_id_is_missing_whatever_its_spelling(text: str):
    assert id_column(pa.array(["a", text, None]))[1].tolist() == [False, True, True]
    assert id_column(pa.array([b"a", text.encode()]))[1].tolist() == [False, True]
    assert id_text(text) is None and id_text(text.encode()) is None


def test_missing_values_of_python_numpy_and_pandas_are_missing():
    for value in (None, float("nan"), np.float32("nan"), np.datetime64("NaT"), pd.NaT, pd.NA, Decimal("nan")):
        assert id_text(value) is None
    assert missing_id(None) == missing_id(" ") == "is empty"
    assert missing_id("nan") == "is the text of a missing value" and missing_id(pd.NA) == "is a missing value"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("NA", "NA"),
        (" 7 ", " 7 "),
        ("1.0", "1.0"),
        ("a\0", "a\0"),
        (np.str_("a"), "a"),
        (7, "7"),
        (np.int32(7), "7"),
        (7.0, "7"),
        (np.float32(7), "7"),
        (10**25, str(10**25)),
        (Decimal("1E+3"), "1000"),
        (b"b\xc3\xa9", "bé"),
    ],
)
def test_values_become_text(value: Any, expected: str):
    assert id_text(value) == expected


@pytest.mark.parametrize(
    ("column", "row", "reason"),
    [
        (pa.array([1.0, 1.5]), 1, "is not a whole number below 2^53; ids must be text or integers"),
        (pa.array([1.0, float("inf")]), 1, "is not a whole number"),
        (pa.array([2.0**53]), 0, "is not a whole number below 2^53"),
        (pa.array([2.0**24], pa.float32()), 0, "is not a whole number below 2^24"),
        (pa.array([Decimal("1.5")]), 0, "is not a whole number"),
        (pa.array([None, True]), 1, "is of type bool; ids must be text or integers"),
        (pa.array([datetime.date(2020, 1, 1)]), 0, "is of type date32"),
        (pa.array([1_600_000_000_123_456_789], pa.timestamp("ns")), 0, "is of type timestamp"),
        (pa.array([None, {"id": "a"}]), 1, "is of type struct<id: string>"),
        (pa.array([["a"]]), 0, "is of type list"),
        (pa.array([b"a", b"\xff\xfe"]), 1, "is binary data, not UTF-8 text"),
        (pa.array([b"\xff" * 16], pa.binary(16)), 0, "is binary data, not UTF-8 text"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_other_columns_are_refused_with_a_row(column: Any, row: int, reason: str):
    with pytest.raises(InvalidValueError, match=re.escape(reason)) as error:
        id_column(column)
    assert error.value.row == row


@pytest.mark.parametrize(
    "value", [True, np.True_, 1.5, float("inf"), [1], {"a": 1}, b"\xff", "a\ud800", Decimal("0.5")]
)
def test_other_values_are_refused(value: Any):
    with pytest.raises(ValueError, match=r"ids must be text or integers|half of a character"):
        id_text(value)


def test_text_that_is_not_utf8_is_refused_although_the_file_marks_it_as_text():
    offsets = pa.py_buffer(np.asarray([0, 1, 2], np.int32))
    for kind in (pa.string(), pa.string_view()):
        column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
        with pytest.raises(InvalidValueError, match="is binary data") as error:
            plain_column(column.cast(kind))
        assert (error.value.row, error.value.value) == (1, b"\xff")


def test_views_of_lists_keep_all_lists():
    lists = [[1.0, 2.0], None, [3.0, 4.0]]
    for kind in (pa.list_view(pa.float32()), pa.large_list_view(pa.float32())):
        assert without_views(pa.chunked_array([pa.array(lists, kind)])).to_pylist() == lists


def test_the_row_index_of_pandas_is_known_by_its_name():
    assert all(map(is_index, ["", "Unnamed: 0", "__index_level_0__"]))
    assert not any(map(is_index, ["asin", "index", "Unnamed"]))
