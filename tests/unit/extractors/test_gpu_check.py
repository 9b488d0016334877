"""The rows of tests/gpu/check.sh on extraction, on a CPU with tiny data."""

import time
from collections.abc import Callable

import pytest
from repository import ROOT


def seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def test_extraction_has_rows_with_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tests/gpu")
    from extraction_rows import image_row, text_row

    rows: list[tuple[str, str, str]] = []
    image_row("ViT-S-32-alt", 6, 4, "cpu", seconds, lambda *row: rows.append(row))
    text_row(12, 8, "cpu", seconds, lambda *row: rows.append(row))
    assert [row[0] for row in rows] == [
        "extraction of 6 images by ViT-S-32-alt",
        "extraction of 12 texts by MiniLM",
    ]
    assert all(row[1].endswith("/s") and row[2].startswith("forward pass alone") for row in rows)
