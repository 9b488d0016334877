"""The results of a study as tables to copy into a paper (LaTeX) or a note (Markdown)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cm3.reports.pages.page import pretty, relative

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def markdown(study: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return the means of `metrics` over the seeds, ± their standard deviation, as a Markdown table; the best in bold."""
    rows = _rows(study, metrics, _markdown_text, lambda mean: f"**{mean}**", " ± ")
    aligned = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], aligned, *rows[1:]])


def latex(study: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return the same as a LaTeX table of the package booktabs."""
    rows = _rows(study, metrics, _latex_text, lambda mean: rf"\textbf{{{mean}}}", r" {\scriptsize $\pm$ ", "}")
    first, *others = (f"{' & '.join(row)} \\\\\n" for row in rows)
    columns = "l" + "r" * (len(rows[0]) - 1)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{first}\\midrule\n{''.join(others)}\\bottomrule\n\\end{{tabular}}\n"


def _rows(
    study: Mapping[str, Any],
    metrics: Sequence[str],
    text: Callable[[str], str],
    bold: Callable[[str], str],
    plus_minus: str,
    after: str = "",
) -> list[list[str]]:
    main = study["main"]
    base = study["experiments"][main]["metrics"][study["headline"]]["mean"]
    rows = [["Experiment", *map(pretty, metrics), f"{pretty(study['headline'])} against {text(main)}"]]
    for name, one in study["experiments"].items():
        row = [text(name)]
        for metric in metrics:
            value = one["metrics"][metric]
            mean = bold(f"{value['mean']:.4f}") if value["best"] else f"{value['mean']:.4f}"
            row.append(mean + (f"{plus_minus}{value['sd']:.4f}{after}" if value["sd"] else ""))
        gain = "" if name == main else relative(one["metrics"][study["headline"]]["mean"], base)
        rows.append([*row, text(gain)])
    return rows


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text).replace("\N{MINUS SIGN}", "$-$")
