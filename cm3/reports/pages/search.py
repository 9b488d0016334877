"""The search of a study on its page: the score of each trial, the importance of each setting, and what was pruned."""

from collections.abc import Mapping, Sequence
from typing import Any

from cm3.reports.pages.chart import Chart, Line, Points
from cm3.reports.pages.page import pretty, setting


def search_sections(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each experiment that was searched its chart, its counts of trials by state, and its trials, best first."""
    if "search" not in study:
        return []
    sections = []
    for name, found in study["search"]["experiments"].items():
        trials = found["trials"]
        counts = {state: sum(t["state"] == state for t in trials) for state in ("complete", "pruned", "failed")}
        ranked = sorted(trials, key=lambda t: (t["state"] != "complete", -(t["score"] or 0), t["number"]))
        sections.append(
            {
                "name": name,
                "chart": _chart(name, found),
                "importance": found["importance"],
                "counts": counts,
                "monitor": found["monitor"],
                "keys": list(ranked[0]["values"]) if ranked else [],
                "trials": ranked,
            }
        )
    return sections


def _chart(name: str, found: Mapping[str, Any]) -> Chart:
    scored = [trial for trial in found["trials"] if trial["score"] is not None]
    best: list[float | None] = []
    reached = None
    for trial in scored:
        if trial["state"] == "complete":
            reached = trial["score"] if reached is None else max(reached, trial["score"])
        best.append(reached)
    series: list[Line | Points] = [Line([trial["number"] for trial in scored], best, tone="muted")]
    for state in ("pruned", "complete"):
        of_state = [trial for trial in scored if trial["state"] == state]
        if of_state:
            series.append(_points(of_state, hollow=state == "pruned"))
    return Chart(
        f"search-{name}",
        f"Search of {name}",
        "trial (hollow: ended early)",
        f"validation {pretty(found['monitor'])}",
        tuple(series),
        wide=500,
        high=300,
    )


def _points(trials: Sequence[Mapping[str, Any]], hollow: bool) -> Points:
    hints = [
        f"trial {t['number']}: {t['score']:.4f}; "
        + ", ".join(f"{key} = {setting(v)}" for key, v in t["values"].items())
        for t in trials
    ]
    scores = [trial["score"] for trial in trials]
    return Points([trial["number"] for trial in trials], scores, [""] * len(trials), hints, hollow=hollow)
