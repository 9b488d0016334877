"""Charts as data: series, axes and ticks. `cm3.reports.pages.figures` draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["accent", "ink", "muted"]


@dataclass(frozen=True)
class Line:
    """A curve through (x, y) with a gap where y is None; the label is placed at the first point."""

    x: Sequence[float]
    y: Sequence[float | None]
    label: str = ""
    tone: Tone = "ink"
    dashed: bool = False


@dataclass(frozen=True)
class Points:
    """Points at (x, y), each with a label (empty: none) and a longer text for readers who point at it."""

    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    hints: Sequence[str] = ()
    tone: Tone = "accent"
    hollow: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars from zero, one for each of the names on the x axis."""

    names: Sequence[str]
    heights: Sequence[float]
    tone: Tone = "accent"


@dataclass(frozen=True)
class Mark:
    """A thin vertical line at x with a label."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: the stem of its files.
        title: for the heading and for screen readers.
        series: drawn back to front.
        marks: vertical lines.
        zero: whether the y axis starts at zero.
        log_x: whether the x axis is logarithmic; all x are then positive.
        wide, high: size on the page in CSS pixels.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Line | Points | Bars, ...]
    marks: tuple[Mark, ...] = ()
    zero: bool = False
    log_x: bool = False
    wide: int = 360
    high: int = 230

    def bars(self) -> Bars | None:
        """Return the bars, if this is a bar chart."""
        return next((one for one in self.series if isinstance(one, Bars)), None)

    def place(self, x: float) -> float:
        """Return the position of x on its axis: its base-10 logarithm on a logarithmic one."""
        return math.log10(x) if self.log_x else x

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return position and text of each tick of the x axis."""
        bars = self.bars()
        if bars:
            return list(enumerate(map(str, bars.names)))
        low, high = self.limits()[0]
        if not self.log_x:
            return labelled(ticks(low, high))
        for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            values = [f * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for f in factors]
            found = [(math.log10(value), f"{value:,g}") for value in values if low <= math.log10(value) <= high]
            if len(found) > 2:
                return found
        # So short a piece of the axis is nearly even.
        return [(math.log10(value), text) for value, text in labelled(ticks(10**low, 10**high))]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Return position and text of each tick of the y axis."""
        return labelled(ticks(*self.limits()[1], about=4))

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the lower and upper limits of x (as positions, see `place`) and of y, with a margin around the values."""
        xs: list[float] = [mark.x for mark in self.marks]
        ys: list[float] = [0.0] if self.zero else []
        for one in self.series:
            if isinstance(one, Bars):
                xs += [-0.5, len(one.names) - 0.5]
                ys += [0.0, *one.heights]
            else:
                xs += one.x
                ys += [y for y in one.y if y is not None]
        xs = [self.place(x) for x in xs]
        return _padded(xs, 0.0 if self.bars() else 0.04), _padded(ys, 0.08, self.zero or self.bars() is not None)


def _padded(values: list[float], share: float, from_zero: bool = False) -> tuple[float, float]:
    values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = (high - low) * share or (abs(high) * 0.1 or 1.0) * (share > 0)
    return low if from_zero and low >= 0 else low - room, high + room


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`, at most `about` + 1."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Return each tick with its text: as many decimals as the step between them needs, and a true minus sign."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    decimals = next((n for n in range(9) if abs(step * 10**n - round(step * 10**n)) < 1e-6 * step * 10**n), 9)
    return [(value, f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")) for value in values]


@dataclass(frozen=True)
class Forest:
    """Means with intervals, one per row, as a figure in a file; a page draws them in the rows of its table."""

    name: str
    title: str
    x_label: str
    names: Sequence[str]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    zero: bool = False
