"""Self-contained HTML pages from templates, with escaped values and a strict content security policy."""

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cm3.common.files import atomic
from cm3.evaluation.registry import METRICS, metric_class
from cm3.reports.pages.figures import svg
from cm3.reports.pages.table_graphics import interval, share_bar

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Fill `template` with `context` and write the page, atomically.

    Every value is escaped unless it is Markup from this package. Style and script are embedded; the content security
    policy allows them by hash, images as data URIs, and nothing else.
    """
    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    text = _environment().get_template(template).render(context, style=style, script=script, policy=policy)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "metric": metric,
        "percent": percent,
        "duration": duration,
        "megabytes": megabytes,
        "setting": setting,
        "unbroken": unbroken,
    }
    environment.globals |= {
        "svg": svg,
        "share_bar": share_bar,
        "interval": interval,
        "pretty": pretty,
        "as_metric": metric,
        "as_short": short,
        "as_duration": duration,
        "relative": relative,
        "as_megabytes": megabytes,
    }
    return environment


def count(value: float | None) -> str:
    """Return a whole number with commas: 12,345."""
    return _NONE if value is None else f"{value:,.0f}"


def metric(value: float | None) -> str:
    """Return a metric with four decimals and a true minus sign."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.4f}".replace("-", "\N{MINUS SIGN}")


def short(value: float | None) -> str:
    """Return a number with three or four significant digits: 0.123, 12.3, 1,234."""
    if value is None:
        return _NONE
    size = abs(value)
    return f"{value:,.{3 if size < 10 else 1 if size < 100 else 0}f}".replace("-", "\N{MINUS SIGN}")


def metric_name(name: str) -> str:
    """Return a metric as papers write it: Recall, NDCG, MRR, MAP."""
    return metric_class(name).title if name in METRICS else name.capitalize()


def pretty(column: str) -> str:
    """Return recall@20 as Recall@20, ndcg@20 as NDCG@20."""
    name, _, k = column.partition("@")
    return f"{metric_name(name)}@{k}" if k else metric_name(name)


def percent(value: float | None) -> str:
    """Return a fraction as a percentage, with one decimal unless it is whole."""
    return _NONE if value is None else f"{100 * value:.1f}".removesuffix(".0") + " %"


def relative(value: float | None, base: float | None) -> str:
    """Return the change from `base` to `value` in percent, with its sign: +31 %, −3.1 %; a dash without a base."""
    if value is None or not base:
        return _NONE
    share = 100 * (value / base - 1)
    decimals = 1 if abs(share) < 9.95 else 0
    return f"{round(share, decimals) + 0.0:+.{decimals}f} %".replace("-", "\N{MINUS SIGN}")


def unbroken(text: str) -> str:
    """Return text whose percentages do not break between number and sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def duration(seconds: float | None) -> str:
    """Return a duration in seconds as text: 0.4 s, 12 s, 2 min 5 s, 3 h 10 min."""
    if seconds is None:
        return _NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def megabytes(value: float | None) -> str:
    """Return megabytes as MB or GB."""
    if value is None:
        return _NONE
    return f"{value / 1000:.1f} GB" if value >= 1000 else f"{value:.0f} MB"


def setting(value: Any) -> str:
    """Return the value of a setting as the configuration writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return str(value)


_NONE = "\N{EN DASH}"
