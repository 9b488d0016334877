"""Charts drawn with matplotlib: as SVG and PNG files, and as inline SVG in the colours and fonts of a page.

Equal numbers give equal bytes.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cm3.common.files import atomic
from cm3.reports.pages.chart import Bars, Chart, Forest, Line, Points
from cm3.reports.pages.chart_layout import BOTTOM, LEFT, RIGHT, TOP, Frame, labels

_COLOURS = {"accent": "#1f5fa8", "ink": "#333333", "muted": "#8a8a8a", "line": "#e4e4e4", "paper": "#ffffff"}
_THEMES = {colour: name for name, colour in _COLOURS.items()}
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, searchable and editable
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # bundled with matplotlib, so that a PNG does not depend on installed fonts
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": _COLOURS["muted"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": _COLOURS["muted"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.6,
}
_DPI, _TITLE = 160, 18
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def save_figures(charts: Sequence[Chart | Forest], folder: Path) -> list[Path]:
    """Draw each chart into `folder` as {name}.svg and {name}.png, and remove other figures from the folder.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": "cm3"}):  # without a salt, ids are random
            figure = _forest(chart) if isinstance(chart, Forest) else _figure(chart, _TITLE)
            # A date or a version in a file would make equal figures differ.
            for suffix, canvas, metadata in (
                ("svg", FigureCanvasSVG, {"Date": None, "Creator": None}),
                ("png", FigureCanvasAgg, {"Software": None}),
            ):
                path = folder / f"{chart.name}.{suffix}"
                figure.set_dpi(_DPI)  # drawing as SVG sets it to 72
                with atomic(path) as temporary:
                    draw: Any = getattr(canvas(figure), f"print_{suffix}")
                    draw(temporary, metadata=metadata)
                paths.append(path)
    for path in folder.glob("*"):
        if path not in paths and path.suffix in (".svg", ".png"):
            path.unlink()
    return paths


def svg(chart: Chart) -> Markup:
    """Return the chart as an <svg> element for a page: colours and fonts come from the page's style sheet.

    Inline styles, which the page's content security policy forbids, become attributes and classes; the hints of points
    and bars become <title> elements.
    """
    written = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": chart.name}):
        canvas: Any = FigureCanvasSVG(_figure(chart))
        canvas.print_svg(written, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE.*?>", "", written.getvalue(), flags=re.DOTALL))
    hints = dict(_hints(chart))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _style_to_attributes(element)
        name = element.attrib.pop("id", None) if element.tag == "g" else None
        if name in hints:
            title = ElementTree.Element("title")
            title.text = hints[name]
            element.insert(0, title)
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        link = element.attrib.pop(f"{_XLINK}href", None)
        if link:
            element.set("href", link)
    root.attrib = {
        "class": "chart",
        "viewBox": f"0 0 {chart.wide} {chart.high}",
        "width": str(chart.wide),
        "height": str(chart.high),
        "role": "img",
        "aria-label": chart.title,
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _style_to_attributes(element: ElementTree.Element) -> None:
    classes = []
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        name, value = (part.strip() for part in declaration.split(":", 1))
        if name in ("fill", "stroke") and value in _THEMES:
            classes.append(f"{name}-{_THEMES[value]}")
        elif not name.startswith("font"):  # the page's style sheet sets the font
            element.set(name, value)
    if element.tag == "text" and not any(one.startswith("fill-") for one in classes):
        classes.append("fill-muted")
    if classes:
        element.set("class", " ".join(classes))


def _hints(chart: Chart) -> Iterator[tuple[str, str]]:
    """Yield (id of the drawn element, text to show when the reader points at it)."""
    for number, one in enumerate(chart.series):
        if isinstance(one, Points):
            for at, hint in enumerate(one.hints):
                yield f"series-{number}-{at}", hint
        elif isinstance(one, Bars):
            for at, (name, height) in enumerate(zip(one.names, one.heights, strict=True)):
                yield f"series-{number}-{at}", f"{name}: {height:,.0f}"


def _figure(chart: Chart, title: int = 0) -> Figure:
    """Draw the chart at one point per CSS pixel, with `title` pixels above for its title (0: none)."""
    wide, high = chart.wide, chart.high + title
    figure = Figure(figsize=(wide / 72, high / 72), dpi=72)
    box = (LEFT / wide, BOTTOM / high, (wide - LEFT - RIGHT) / wide, (chart.high - TOP - BOTTOM) / high)
    axes = figure.add_axes(box)
    if title:
        figure.text(4 / wide, 1 - 4 / high, chart.title, va="top", fontsize=10, color=_COLOURS["ink"])
    else:
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
    for number, one in enumerate(chart.series):
        _draw(axes, one, f"series-{number}")
    frame = Frame(chart)
    for label in labels(chart):
        x, y = label.x + label.dx, label.y + label.dy
        place = (x / wide, 1 - (y + title) / high)
        side = "right" if label.before else "left"
        figure.text(*place, label.text, ha=side, va="center_baseline", color=_COLOURS[label.tone])
        if label.away:
            ends = [(label.x / wide, 1 - (label.y + title) / high), ((x - label.dx / 4) / wide, place[1])]
            line = matplotlib.lines.Line2D(*zip(*ends, strict=True), color=_COLOURS["muted"], linewidth=0.6)
            figure.add_artist(line)
    for mark in chart.marks:
        axes.axvline(mark.x, color=_COLOURS["muted"], linewidth=0.8, linestyle=":")
        side = "right" if frame.label_overflows(mark) else "left"
        figure.text(frame.x(mark.x) / wide, 1 - (TOP - 6 + title) / high, mark.label, ha=side, color=_COLOURS["muted"])
    x_limits, y_limits = chart.limits()
    if chart.log_x:
        axes.set_xscale("log")
        x_limits = (10 ** x_limits[0], 10 ** x_limits[1])
    places, names = zip(*chart.x_ticks(), strict=True)
    axes.set_xticks([10**place if chart.log_x else place for place in places], names)
    axes.set_xticks([], minor=True)
    axes.set_yticks(*zip(*chart.y_ticks(), strict=True))
    axes.set(xlim=x_limits, ylim=y_limits)
    figure.text((wide - RIGHT) / wide, 7 / high, chart.x_label, ha="right", color=_COLOURS["muted"])
    if chart.y_label:
        above = f"\N{UPWARDS ARROW} {chart.y_label}"
        figure.text(4 / wide, 7 / high, above, ha="left", color=_COLOURS["muted"])
    return figure


def _draw(axes: Any, one: Line | Points | Bars, name: str) -> None:
    colour = _COLOURS[one.tone]
    if isinstance(one, Bars):
        for at, height in enumerate(one.heights):
            axes.bar([at], [height], width=0.72, color=colour)[0].set_gid(f"{name}-{at}")
    elif isinstance(one, Line):
        values = [float("nan") if y is None else y for y in one.y]
        axes.plot(one.x, values, color=colour, linewidth=1.4, linestyle="--" if one.dashed else "-", gid=name)
    else:
        face = _COLOURS["paper"] if one.hollow else colour
        for at, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            axes.plot([x], [y], "o", ms=6, mfc=face, mec=colour, zorder=3, clip_on=False, gid=f"{name}-{at}")


def _forest(forest: Forest) -> Figure:
    rows = range(len(forest.names))
    figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(forest.names)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    if forest.zero:
        axes.axvline(0, color=_COLOURS["muted"], linewidth=0.8, linestyle=":")
    axes.hlines(rows, forest.lows, forest.highs, color=_COLOURS["muted"], linewidth=1.4)
    axes.plot(forest.means, rows, "o", color=_COLOURS["accent"], markersize=4.5)
    axes.set_yticks(rows, forest.names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=forest.title, xlabel=forest.x_label)
    return figure
