"""Charts as files: each one as SVG and as PNG, the same bytes for the same numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cm3.common.files import atomic
from cm3.reports.pages.chart import Bars, Chart, Forest, Line, Points
from cm3.reports.pages.chart_layout import anchors, labels

_TONES = {"accent": "#1f5fa8", "ink": "#333333", "muted": "#8a8a8a"}
_SETTINGS: Any = {
    "svg.hashsalt": "cm3",  # else ids in the file are random
    "svg.fonttype": "none",  # text stays text, to be searched and edited
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that a PNG does not depend on the machine's fonts
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
}
_DPI = 160


def save_figures(charts: Sequence[Chart | Forest], folder: Path) -> list[Path]:
    """Draw each chart into `folder` as {name}.svg and {name}.png, and remove figures there that are no longer drawn.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(_SETTINGS):
        for chart in charts:
            figure = _forest(chart) if isinstance(chart, Forest) else _figure(chart)
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


def _figure(chart: Chart) -> Figure:
    figure = Figure(figsize=(chart.wide / 72, chart.high / 72 + 0.35), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for one in chart.series:
        _draw(axes, one)
    for label, at in zip(labels(chart), anchors(chart), strict=True):
        axes.annotate(
            label.text,
            at,
            xytext=(label.dx, -label.dy),
            textcoords="offset points",
            color=_TONES[label.tone],
            ha="right" if label.before else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "color": _TONES["muted"], "linewidth": 0.6} if label.away else None,
        )
    for mark in chart.marks:
        axes.axvline(mark.x, color=_TONES["muted"], linewidth=0.8, linestyle=":")
        axes.annotate(
            mark.label,
            (mark.x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color=_TONES["muted"],
            fontsize=8,
        )
    x_limits, y_limits = chart.limits()
    if chart.log_x:
        axes.set_xscale("log")
        x_limits = (10 ** x_limits[0], 10 ** x_limits[1])
        places, names = zip(*chart.x_ticks(), strict=True)
        axes.set_xticks([10**place for place in places], names)
        axes.set_xticks([], minor=True)
    axes.set(xlim=x_limits, ylim=y_limits, title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    return figure


def _forest(forest: Forest) -> Figure:
    rows = range(len(forest.names))
    figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(forest.names)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    if forest.zero:
        axes.axvline(0, color=_TONES["muted"], linewidth=0.8, linestyle=":")
    axes.hlines(rows, forest.lows, forest.highs, color=_TONES["muted"], linewidth=1.4)
    axes.plot(forest.means, rows, "o", color=_TONES["accent"], markersize=4.5)
    axes.set_yticks(rows, forest.names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=forest.title, xlabel=forest.x_label)
    return figure


def _draw(axes: Any, one: Line | Points | Bars) -> None:
    colour = _TONES[one.tone]
    if isinstance(one, Bars):
        axes.bar(range(len(one.names)), one.heights, width=0.72, color=colour)
        axes.set_xticks(range(len(one.names)), one.names)
    elif isinstance(one, Line):
        values = [float("nan") if y is None else y for y in one.y]
        axes.plot(one.x, values, color=colour, linewidth=1.4, linestyle="--" if one.dashed else "-")
    else:
        face = "none" if one.hollow else colour
        axes.scatter(one.x, one.y, s=22, facecolors=face, edgecolors=colour, zorder=3)
