"""Charts as inline SVG: sharp at any size, in the page's own colours and type, light and dark."""

from markupsafe import Markup

from cm3.reports.pages.chart import Bars, Chart, Line, Mark, Points, labelled, ticks
from cm3.reports.pages.chart_layout import CHARACTER, LEFT, RIGHT, TOP, Frame, Label, labels

_GRID = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')


def svg(chart: Chart) -> Markup:
    """Return the chart as an <svg> element that is styled by the page's style sheet; all texts are escaped."""
    frame = Frame(chart)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{t}">').format(
            w=chart.wide, h=chart.high, t=chart.title
        ),
        _axes(chart, frame),
        *(_mark(mark, frame) for mark in chart.marks),
        *(_draw(one, frame) for one in chart.series),
        *(_label(label) for label in labels(chart)),
        Markup("</svg>"),
    ]
    return Markup("").join(parts)


def _axes(chart: Chart, frame: Frame) -> Markup:
    right = chart.wide - RIGHT
    parts = []
    for value, label in labelled(ticks(*frame.y_limits, about=4)):
        y = _n(frame.y(value))
        parts.append(_GRID.format(LEFT, right, y, y))
        parts.append(Markup('<text class="tick end" x="{}" y="{}" dy="4">{}</text>').format(LEFT - 6, y, label))
    for value, label in chart.x_ticks():
        x = _n(frame.at(value))
        parts.append(Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(x, frame.bottom + 16, label))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, right, y=frame.bottom))
    below = chart.high - 6
    parts.append(Markup('<text class="label end" x="{}" y="{}">{}</text>').format(right, below, chart.x_label))
    if chart.y_label:
        text = f"\N{UPWARDS ARROW} {chart.y_label}"
        parts.append(Markup('<text class="label" x="4" y="{}">{}</text>').format(below, text))
    return Markup("").join(parts)


def _mark(mark: Mark, frame: Frame) -> Markup:
    x = frame.x(mark.x)
    right = x + len(mark.label) * CHARACTER > frame.chart.wide
    return Markup(
        '<line class="mark" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/><text class="{c}" x="{t}" y="{y}">{l}</text>'
    ).format(
        x=_n(x),
        a=TOP,
        b=frame.bottom,
        c="label end" if right else "label",
        t=_n(x),
        y=TOP - 6,
        l=mark.label,
    )


def _draw(one: Line | Points | Bars, frame: Frame) -> Markup:
    if isinstance(one, Line):
        return _line(one, frame)
    return _points(one, frame) if isinstance(one, Points) else _bars(one, frame)


def _line(line: Line, frame: Frame) -> Markup:
    path, pen_down = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{_n(frame.x(x))} {_n(frame.y(y))}")
        pen_down = True
    dashed = " dashed" if line.dashed else ""
    return Markup('<path class="line {}{}" d="{}"/>').format(line.tone, dashed, "".join(path))


def _points(points: Points, frame: Frame) -> Markup:
    kind = f"{points.tone}{' hollow' if points.hollow else ''}"
    parts = []
    for number, (x, y) in enumerate(zip(points.x, points.y, strict=True)):
        hint = Markup("<title>{}</title>").format(points.hints[number]) if points.hints else ""
        at = (_n(frame.x(x)), _n(frame.y(y)))
        parts.append(Markup('<circle class="point {}" cx="{}" cy="{}" r="4">{}</circle>').format(kind, *at, hint))
    return Markup("").join(parts)


def _label(label: Label) -> Markup:
    x, y = label.x + label.dx, label.y + label.dy
    text = Markup('<text class="name {}{}" x="{}" y="{}" dy="4">{}</text>').format(
        label.tone, " end" if label.before else "", _n(x), _n(y), label.text
    )
    if not label.away:
        return text
    ends = (_n(label.x), _n(x - label.dx / 4), _n(label.y), _n(y))
    return Markup('<line class="leader" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(*ends) + text


def _bars(bars: Bars, frame: Frame) -> Markup:
    width = frame.x(1) - frame.x(0)
    zero = frame.y(0)
    return Markup("").join(
        Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            bars.tone,
            _n(frame.x(number) - width * 0.36),
            _n(frame.y(height)),
            _n(width * 0.72),
            _n(zero - frame.y(height)),
            f"{name}: {height:,.0f}",
        )
        for number, (name, height) in enumerate(zip(bars.names, bars.heights, strict=True))
    )


def share_bar(parts: list[tuple[str, float]], label: str) -> Markup:
    """Return a thin bar whose parts, (class, share of 1), lie side by side."""
    drawn, start = [], 0.0
    for name, share in parts:
        drawn.append(
            Markup('<rect class="{}" x="{}" y="0" width="{}" height="8"/>').format(
                name, _n(start * 100), _n(share * 100)
            )
        )
        start += share
    return Markup(
        '<svg class="shares" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(label, Markup("").join(drawn))


def interval(
    mean: float, low: float | None, high: float | None, scale: tuple[float, float], zero: bool = False
) -> Markup:
    """Return a mean as a dot with its interval as a line, on a scale that all rows of a table share.

    Args:
        mean, low, high: the estimate and its interval; without `low` and `high` the dot stands alone.
        scale: the lowest and highest value that the row has room for.
        zero: whether a line is drawn at zero, which a difference is compared with.
    """
    wide, pad = 180, 6
    first, last = scale
    span = (last - first) or 1.0

    def place(value: float) -> str:
        return _n(pad + (value - first) / span * (wide - 2 * pad))

    text = f"{mean:.4f}" + (f", from {low:.4f} to {high:.4f}" if low is not None and high is not None else "")
    parts = [
        Markup('<svg class="interval" viewBox="0 0 {} 18" width="{}" height="18" role="img" aria-label="{}">').format(
            wide, wide, text
        )
    ]
    parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="9" y2="9"/>').format(pad, wide - pad))
    if zero and first <= 0 <= last:
        parts.append(Markup('<line class="mark" x1="{x}" x2="{x}" y1="0" y2="18"/>').format(x=place(0.0)))
    if low is not None and high is not None:
        clear = " clear" if zero and (low > 0 or high < 0) else ""
        parts.append(
            Markup('<line class="range{}" x1="{}" x2="{}" y1="9" y2="9"/>').format(clear, place(low), place(high))
        )
        parts += [
            Markup('<line class="range{c}" x1="{x}" x2="{x}" y1="6" y2="12"/>').format(c=clear, x=place(end))
            for end in (low, high)
        ]
    parts.append(Markup('<circle class="point accent" cx="{}" cy="9" r="3.5"/></svg>').format(place(mean)))
    return Markup("").join(parts)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
