"""tests/gpu/check.sh on a CPU with tiny data: its rows, and that a check that fails does not stop the others."""

import sys

import pytest
from repository import ROOT
from training_shop import one_thread

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CM3_CHECK_DEVICE", "cpu")
    for folder in ("tests/gpu", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)


def test_extraction_has_rows_with_the_forward_pass_alone():
    import extraction_rows

    rows = [
        extraction_rows.images("ViT-S-32-alt", 6, 4, "cpu"),
        extraction_rows.texts(12, 8, "cpu"),
        extraction_rows.multimodal(2, 3, 2, "cpu"),
    ]
    assert all(found.endswith("/s") and bare.startswith("forward pass alone") for found, bare in rows)


def test_a_step_with_and_without_a_cuda_graph():
    import training_rows

    found, without = training_rows.graphed_step(8)
    assert found.endswith(" ms") and without.startswith("without ")
    assert float(without.rsplit(" ", 1)[1]) < 1e-3


CHILD = """
import os, sys, time
for number in range(int(sys.argv[1]), 5):
    if number == 1:
        print("| b | FAILED: RuntimeError: an error |", flush=True)
        sys.exit(3)
    if number == 2:
        os.abort()
    if number == 3:
        time.sleep(600)
    print(f"noise\\n| {'abcde'[number]} | found |", flush=True)
"""


def test_a_check_that_fails_crashes_or_hangs_does_not_stop_the_others(capfd):
    import check

    assert check.run_all("abcde", [sys.executable, "-c", CHILD], limit=5) == 3
    assert capfd.readouterr().out.splitlines() == [
        "| a | found |",
        "| b | FAILED: RuntimeError: an error |",
        "| c | FAILED: exit status -6 |  |  |",
        "| d | FAILED: not finished after 5 s |  |  |",
        "| e | found |",
    ]


def test_every_check_has_a_row_of_its_own():
    import check

    assert len(check.checks()) == 17
