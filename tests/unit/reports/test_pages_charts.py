"""Charts: scales, labels that do not cover one another, SVG for pages, figures for files."""

import io
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from cm3.reports.pages.chart import Bars, Chart, Forest, Line, Mark, Points, labelled, ticks
from cm3.reports.pages.chart_layout import labels
from cm3.reports.pages.figures import save_figures, svg
from cm3.reports.pages.page import count, duration, megabytes, metric, percent, pretty, setting, short
from cm3.reports.pages.study_page import planes
from cm3.reports.pages.table_graphics import interval, share_bar

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(NUMBERS, st.floats(1e-6, 1e6))
def test_ticks_are_round_evenly_spaced_and_inside(low, span):
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)
    if len(found) > 2 and span > 1e-9 * abs(low):
        steps = np.diff(found)
        assert np.allclose(steps, steps[0], rtol=1e-3)
        lead = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(lead - one) for one in (1, 2, 5, 10)) < 1e-2


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([-2.0, 0.0, 2.0], ["\N{MINUS SIGN}2", "0", "2"]),
        ([0.0, 1000.0, 2000.0], ["0", "1,000", "2,000"]),
        ([0.0, 0.002], ["0.000", "0.002"]),
    ],
)
def test_tick_labels_have_the_decimals_they_need(values, texts):
    assert [text for _, text in labelled(values)] == texts


def test_a_logarithmic_axis_places_by_powers():
    chart = Chart("c", "t", "x", "y", (Points([1.0, 10.0, 1000.0], [1.0, 2.0, 3.0]),), log_x=True)
    assert [text for _, text in chart.x_ticks()] == ["1", "10", "100", "1,000"]
    places = [float(x) for x in _attributes(svg(chart), "use", "x")]
    assert (places[2] - places[1]) == pytest.approx(2 * (places[1] - places[0]), abs=0.3)


@pytest.mark.parametrize("seconds", [[349.2, 393.5], [0.0203, 0.0204], [7.0], [5.0, 5.0], [19.9, 21.0]])
def test_a_short_piece_of_a_logarithmic_axis_has_ticks_that_differ(seconds):
    chart = Chart("c", "t", "x", "y", (Points(seconds, [1.0 + n for n in range(len(seconds))]),), log_x=True)
    found = chart.x_ticks()
    low, high = chart.limits()[0]
    assert len(found) > 1 and len({text for _, text in found}) == len(found)
    assert all(low - 1e-9 <= place <= high + 1e-9 for place, _ in found)
    for place, text in found:
        assert 10**place == pytest.approx(float(text.replace(",", "")), rel=1e-6)
    assert svg(chart)


def test_a_model_whose_vectors_all_point_one_way_has_no_place_in_the_plane():
    def one(users: float, items: float, alignment: float) -> dict:
        geometry = {"uniformity_users": users, "uniformity_items": items, "alignment": alignment}
        return {"control": None, "geometry": {name: {"mean": value} for name, value in geometry.items()}}

    closed_form = {"control": None, "geometry": None}
    study = {"experiments": {"cm3": one(-2.0, -1.5, 0.6), "mostpop": one(0.0, 0.0, 0.0), "ease": closed_form}}
    users, items = planes(study)
    for plane, place in ((users, -2.0), (items, -1.5)):
        (series,) = plane.series
        assert (series.x, series.y, series.labels) == ([place], [0.6], ["cm3"])


def _attributes(drawn, tag, name):
    tree = ElementTree.fromstring(f"<root>{drawn}</root>")
    return [element.get(name) for element in tree.iter(tag)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_labels_do_not_cover_each_other(spots):
    names = [f"model-{number}" for number in range(len(spots))]
    chart = Chart(
        "c", "t", "x", "y", (Points([x for x, _ in spots], [y for _, y in spots], names),), wide=500, high=340
    )
    boxes = [label.box() for label in labels(chart)]
    assert len(boxes) == len(spots)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= 500 and top >= -7 and bottom <= 340
        for other in boxes[number + 1 :]:
            assert not (left < other[2] and other[0] < right and top + 1 < other[3] and other[1] < bottom - 1)


def test_texts_in_a_chart_are_escaped_wherever_they_stand():
    bad = '<script>"&'
    chart = Chart(
        "c", bad, bad, bad, (Points([0, 1], [0, 1], [bad, ""], [bad, bad]), Line([0, 1], [1, 0], bad)), (Mark(1, bad),)
    )
    drawn = svg(chart)
    assert isinstance(drawn, Markup) and "<script>" not in drawn
    tree = ElementTree.fromstring(drawn)
    assert tree.get("aria-label") == bad
    assert sum(bad in (element.text or "") for element in tree.iter()) == 7  # two axes, two labels, two hints, the mark


def test_a_gap_breaks_the_line():
    drawn = svg(Chart("c", "t", "x", "y", (Line([1, 2, 3, 4], [1.0, None, 3.0, 4.0]),)))
    path = next(d for d in _attributes(drawn, "path", "d") if d.count("M") == 2)
    assert path.count("M") == 2 and path.count("L") == 1


def test_bars_stand_on_zero_at_their_height():
    drawn = svg(Chart("c", "t", "x", "y", (Bars(["a", "b"], [10, 20]),)))
    bars = [path for path in ElementTree.fromstring(drawn).iter("path") if "fill-accent" in (path.get("class") or "")]
    ends = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d") or "")] for path in bars]
    heights = [max(y) - min(y) for y in ends]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.001)
    assert max(ends[0]) == max(ends[1]), "both start at zero"


def test_an_interval_lies_on_the_scale_it_shares():
    drawn = interval(0.5, 0.0, 1.0, (0.0, 1.0), zero=True)
    ends = sorted({float(x) for x in _attributes(drawn, "line", "x1")})
    middle = float(_attributes(drawn, "circle", "cx")[0])
    assert middle == pytest.approx((ends[0] + ends[-1]) / 2, abs=0.2)
    assert "clear" not in drawn, "an interval that touches zero is not clear of it"
    assert "clear" in interval(0.5, 0.1, 1.0, (0.0, 1.0), zero=True)
    assert "0.5000, from 0.1000 to 1.0000" in interval(0.5, 0.1, 1.0, (0.0, 1.0))


def test_shares_fill_the_bar():
    widths = [float(w) for w in _attributes(share_bar([("ok", 0.75), ("missing", 0.25)], "75 %"), "rect", "width")]
    assert widths == [75.0, 25.0]


def test_figures_are_well_formed_the_same_each_time_and_old_ones_go(tmp_path):
    charts = [
        Chart(
            "curve", "Costs $5 and $6", "epoch", "loss", (Line([1, 2, 3], [3.0, None, 1.0], "a"),), (Mark(2, "best"),)
        ),
        Chart("plane", "t", "x", "y", (Points([1.0, 100.0], [0.1, 0.2], ["a", "b"], hollow=True),), log_x=True),
        Chart("bars", "t", "x", "y", (Bars(["1-2", "3-4"], [5, 6]),)),
        Forest("forest", "t", "Recall@20", ["a", "b"], [0.1, 0.2], [0.05, 0.1], [0.2, 0.3], zero=True),
    ]
    (tmp_path / "old.svg").write_text("gone")
    paths = save_figures(charts, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == sorted(f"{c.name}.{suffix}" for c in charts for suffix in ("png", "svg"))
    assert sorted(path.name for path in paths) == sorted(first)
    save_figures(charts, tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, content in first.items():
        if name.endswith(".svg"):
            assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert Image.open(io.BytesIO(content)).size[0] > 400
    assert b"Costs $5 and $6" in first["curve.svg"]


def test_numbers_read_as_people_write_them():
    assert [metric(x) for x in (0.12345, -0.5, None, float("nan"))] == ["0.1235", "\N{MINUS SIGN}0.5000", "–", "–"]
    assert [duration(x) for x in (0.44, 12.3, 59.7, 125, 11400, None)] == [
        "0.4 s",
        "12 s",
        "1 min 0 s",
        "2 min 5 s",
        "3 h 10 min",
        "–",
    ]
    assert [percent(x) for x in (1.0, 0.1234, None)] == ["100 %", "12.3 %", "–"]
    assert [count(x) for x in (12345, None)] == ["12,345", "–"] and [megabytes(x) for x in (640.2, 1500)] == [
        "640 MB",
        "1.5 GB",
    ]
    assert [short(x) for x in (0.1234, 12.34, 1234.5)] == ["0.123", "12.3", "1,234"]
    assert [setting(x) for x in (None, True, [1, None], "x")] == ["null", "true", "1, null", "x"]
    assert [pretty(x) for x in ("recall@20", "ndcg@5", "hitrate@1")] == ["Recall@20", "NDCG@5", "Hit rate@1"]
