"""Log files of stages: their errors and warnings, for the end of a run."""

import re
from collections.abc import Iterator
from pathlib import Path

LINE = re.compile(r"\d\d:\d\d:\d\d (?P<level>[A-Z]+) [\w.]+: (?P<text>.*)")
"""A line of a stage's log, as `cm3.common.cli` writes it."""
MOST_WARNINGS = 3


def _messages(log: Path, level: str) -> Iterator[str]:
    """Yield the messages of a level, those of several lines whole, without tracebacks."""
    text: list[str] = []
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                match = LINE.match(line)
                if match or line.startswith("Traceback"):
                    if text:
                        yield "\n".join(text)
                    text = [match["text"].strip()] if match and match["level"] == level else []
                elif text:
                    text.append(line.rstrip())
    except OSError:
        pass
    if text:
        yield "\n".join(text)


def last_error(log: Path) -> str | None:
    """Return the last error in a log; without one its last line, None if it is empty or absent."""
    errors = list(_messages(log, "ERROR"))
    if errors:
        return errors[-1]
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    match = LINE.match(last or "")
    return None if match or last is None else last


def warnings_in(log: Path) -> list[str]:
    """Return the different warnings in a log; of many, the first ones and the number of the others."""
    found = list(dict.fromkeys(_messages(log, "WARNING")))
    more = len(found) - MOST_WARNINGS
    return found if more <= 0 else [*found[:MOST_WARNINGS], f"and {more} more warnings in {log}"]
