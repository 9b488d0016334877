"""Layout of a chart: values to pixels, and labels next to their points without overlap."""

from dataclasses import dataclass

from cm3.reports.pages.chart import Chart, Line, Mark, Points

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 20, 40
CHARACTER, LINE = 6.3, 13.0
"""Width of a letter and height of a line of a label, roughly, in pixels."""
_GAP, _LEVELS = 8.0, 24


class Frame:
    """Maps a chart's values onto pixels, y downwards."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.x_limits, self.y_limits = chart.limits()
        self.bottom = chart.high - BOTTOM

    def at(self, place: float) -> float:
        """Return the pixel of a place on the x axis, as `Chart.place` has it."""
        low, high = self.x_limits
        return LEFT + (place - low) / (high - low) * (self.chart.wide - LEFT - RIGHT)

    def x(self, value: float) -> float:
        """Return the pixel of a value of x."""
        return self.at(self.chart.place(value))

    def y(self, value: float) -> float:
        """Return the pixel of a value of y."""
        low, high = self.y_limits
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def label_overflows(self, mark: Mark) -> bool:
        """Return whether a mark's label would pass the right edge if it began at the mark."""
        return self.x(mark.x) + len(mark.label) * CHARACTER > self.chart.wide


@dataclass(frozen=True)
class Label:
    """Text of a series at an offset (dx, dy) in pixels from its point (x, y); right-aligned there if `before`."""

    text: str
    tone: str
    x: float
    y: float
    dx: float
    dy: float
    before: bool

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels."""
        width = len(self.text) * CHARACTER
        left = self.x + self.dx - (width if self.before else 0)
        return left, self.y + self.dy - LINE / 2, left + width, self.y + self.dy + LINE / 2

    @property
    def away(self) -> bool:
        """Whether the text is so far from its point that a thin line should connect them."""
        return abs(self.dy) > LINE


def labels(chart: Chart) -> list[Label]:
    """Return a place for every label of points and lines: the first free one to the right or left, level, above or below."""
    frame = Frame(chart)
    points = [one for one in chart.series if isinstance(one, Points)]
    marks = [(frame.x(x), frame.y(y)) for one in points for x, y in zip(one.x, one.y, strict=True)]
    placed: list[Label] = []
    for text, tone, value_x, value_y in _wanted(chart):
        x, y = frame.x(value_x), frame.y(value_y)
        candidates = [
            Label(text, tone, x, y, -_GAP if before else _GAP, step * LINE, before)
            for level in range(_LEVELS)
            for step in (level, -level)
            for before in (False, True)
        ]
        inside = [one for one in candidates if _inside(one, chart)] or candidates[:1]
        free = [one for one in inside if not _covers(one, placed)] or inside[:1]
        placed.append(next((one for one in free if not _hides(one, marks)), free[0]))
    return placed


def _wanted(chart: Chart) -> list[tuple[str, str, float, float]]:
    found: list[tuple[str, str, float, float]] = []
    for one in chart.series:
        if isinstance(one, Points):
            found += [(t, one.tone, x, y) for t, x, y in zip(one.labels, one.x, one.y, strict=False) if t]
        elif isinstance(one, Line) and one.label:
            there = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
            found += [(one.label, one.tone, x, y) for x, y in there[:1]]
    return found


def _inside(label: Label, chart: Chart) -> bool:
    left, top, right, bottom = label.box()
    return left >= LEFT - 8 and right <= chart.wide and top >= 0 and bottom <= chart.high - BOTTOM + 2


def _covers(label: Label, placed: list[Label]) -> bool:
    left, top, right, bottom = label.box()
    boxes = [other.box() for other in placed]
    return any(left < c and a < right and top < d - 1 and b < bottom - 1 for a, b, c, d in boxes)


def _hides(label: Label, marks: list[tuple[float, float]]) -> bool:
    left, top, right, bottom = label.box()
    return any(left - 3 < x < right + 3 and top - 1 < y < bottom + 1 for x, y in marks)
