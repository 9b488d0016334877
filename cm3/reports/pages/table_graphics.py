"""Small graphics inside the cells of a table: bars of shares and intervals on a common scale, as inline SVG."""

from markupsafe import Markup


def share_bar(parts: list[tuple[str, float]], label: str) -> Markup:
    """Return a thin bar whose parts, (class, share of 1), follow one another."""
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
        mean, low, high: the estimate and its interval; without `low` and `high` only the dot is drawn.
        scale: lowest and highest value of the row's range.
        zero: whether to draw a line at zero, for differences.
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
