"""Times of every form and type as Unix seconds; a column has one form, and 0 is unknown in each."""

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cm3.datasets.times import Times, as_number, as_numbers

NOON = 1_600_257_600


class RefusedError(Exception):
    """The first of the refused rows, and the complaint."""


def check(bad: np.ndarray, complaint: str) -> None:
    if bad.any():
        raise RefusedError(f"row {int(np.flatnonzero(bad)[0])} {complaint}")


def parse(*parts: Any, times: Times | None = None) -> list[int]:
    times = times or Times()
    columns = [part if isinstance(part, pa.Array) else pa.array(part) for part in parts]
    return [second for column in columns for second in times.parse(pa.chunked_array([column]), check).tolist()]


@pytest.mark.parametrize(
    ("column", "seconds"),
    [
        (["2020-09-16T12:00:00.1234567Z"], NOON),
        (["2020-09-16T12:00:00.123456789"], NOON),
        (["2020-09-16 12:00:00.1234567890123+00:00"], NOON),
        (["0", "2020-09-16T12:00:00", "0"], NOON),
        (["0.0", "2020-09-16"], NOON - 43_200),
        ([202009], 1_598_918_400),
        (["202009"], 1_598_918_400),
        ([0, 202009, 202009], 1_598_918_400),
        ([2020], 1_577_836_800),
        ([20200916.0], NOON - 43_200),
        ([Decimal("1600257600.25")], NOON),
        (["1.6002576e9"], NOON),
        ([" 1600257600 "], NOON),
        ([dt.date(2020, 9, 16)], NOON - 43_200),
        (pa.array([dt.date(2020, 9, 16)], pa.date64()), NOON - 43_200),
        (pa.array([NOON], pa.timestamp("s", "America/New_York")), NOON),
        (pa.array([NOON * 10**9 + 1], pa.timestamp("ns")), NOON),
        (pa.array(["2020-09-16 12:00:00"], pa.string_view()), NOON),
        (pa.array(["2020-09-16 12:00:00", "2020-09-16 12:00:00"]).dictionary_encode(), NOON),
        ([b"2020-09-16 12:00:00"], NOON),
        (pa.array([NOON * 1000], pa.uint64()), NOON),
    ],
)
def test_every_form_is_read_as_what_it_is(column: Any, seconds: int):
    assert {second for second in parse(column) if second} == {seconds}


def test_unknown_times_first_do_not_decide_on_the_form():
    assert parse(["0", "0"], ["0", "2020-09-16T12:00:00Z"], ["0"]) == [0, 0, 0, NOON, 0]
    assert parse([0, 0], [NOON * 1000]) == [0, 0, NOON]
    assert parse([0], [202009], [0]) == [0, 1_598_918_400, 0]


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([[True]], "row 0 is not a time"),
        ([pa.array([5], pa.time32("s"))], "row 0 is not a time"),
        ([pa.array([5], pa.duration("s"))], "row 0 is not a time"),
        ([[{"$date": "2020-09-16"}]], "row 0 is not a time"),
        ([[[NOON]]], "row 0 is not a time"),
        ([pa.nulls(2)], "row 0 is empty; a time is needed, or 0 where it is unknown"),
        ([[NOON, None]], "row 1 is empty"),
        ([[float("nan")]], "row 0 is not a time"),
        ([["2020-09-16", None]], "row 1 is empty"),
        ([["2020-09-16", ""]], "row 1 is empty"),
        ([[dt.datetime(2020, 9, 16), None]], "row 1 is empty"),
        ([["1_600_257_600"]], "row 0 is not a time"),
        ([["٢٠٢٠"]], "row 0 is not a time"),
        ([["2020-09"]], "row 0 is not a time"),
        ([["2020-09-16 10:00 AM"]], "row 0 is not a time"),
        ([[NOON * 10**6]], "row 0 is not between 1970 and 2099"),
        ([[NOON * 10**9]], "row 0 is not between 1970 and 2099"),
        ([[NOON, -5]], "row 1 is not between 1970 and 2099"),
        ([[20200916100000]], "row 0 is not between 1970 and 2099"),
        ([[str(10**25)]], "row 0 is not between 1970 and 2099"),
        ([[202009], [202013]], "row 0 is not a date in a column of months like 202009"),
        ([[2020], [20200916]], "row 0 is not a date in a column of years like 2020"),
        ([["2020-09-16T12:00:00Z", "2020-09-16T12:00:00"]], "row 1 mixes times with and without time zone"),
        ([pa.array([2**53], pa.timestamp("s"))], "row 0 is not a time"),
        ([pa.array([2**63 - 1], pa.timestamp("ns"))], "row 0 is after 2099"),
    ],
)
def test_other_values_are_refused_with_a_row(parts: Any, complaint: str):
    with pytest.raises(RefusedError, match=complaint):
        parse(*parts)


def test_seconds_and_milliseconds_may_be_mixed_where_that_is_allowed():
    assert parse([NOON, NOON * 1000], times=Times(mixed_units=True)) == [NOON, NOON]
    with pytest.raises(RefusedError, match="row 1 is not between"):
        parse([NOON, NOON * 10**6], times=Times(mixed_units=True))


def test_numbers_are_read_strictly():
    assert as_number(" 4.5 ") == 4.5 and np.isnan([as_number(x) for x in ("4,5", "1_0", "٣", None, {"a": 1})]).all()
    assert as_numbers(pa.chunked_array([["4", "x"]])).tolist()[0] == 4
    assert np.isnan(as_numbers(pa.chunked_array([[{"a": 1}]]))).all()
