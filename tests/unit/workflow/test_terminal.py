"""The terminal of a run: a line for each job, failures with their reasons last, warnings, and errors in one line."""

import io
import logging
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from snakemake.exceptions import MissingRuleException, RuleException, WorkflowError
from snakemake_interface_logger_plugins.common import LogEvent

from cm3.common.errors import UserError
from cm3.common.files import write_json
from workflow.stage_logs import last_error, warnings_in
from workflow.terminal import Terminal, quoted, user_error

LOG = """09:00:00 INFO cm3.training.loop: epoch 1
09:00:01 WARNING cm3.datasets.prepare: 46 % of interactions dropped
09:00:01 WARNING cm3.datasets.prepare: 46 % of interactions dropped
09:00:02 ERROR stage: cm3.training.train: the loss is not finite
in batch 3
Traceback (most recent call last):
  File "x.py", line 1
"""


class Screen:
    """A terminal with a buffer as its stream, and the handler of Snakemake that it replaces."""

    def __init__(self, executes: bool = True, left_out: Collection[LogEvent] = (), **options: Any) -> None:
        self.stream, self.original_stream = io.StringIO(), io.StringIO()
        original = logging.StreamHandler(self.original_stream)
        original.addFilter(lambda record: getattr(record, "event", None) not in left_out)
        self.terminal = Terminal(original, lambda: executes, stream=self.stream, **options)

    def send(self, event: LogEvent | None, text: str = "", level: int = logging.INFO, **fields: Any) -> None:
        record = logging.LogRecord("snakemake", level, "jobs.py", 1, text, (), None)
        vars(record).update(event=event, **fields)
        self.terminal.handle(record)

    def start(self, number: int, rule: str, *outputs: str, log: str = "job.log", **wildcards: str) -> None:
        fields = {"rule_name": rule, "output": list(outputs), "log": [log], "shellcmd": f"python -m {rule}"}
        self.send(LogEvent.JOB_INFO, jobid=number, wildcards=wildcards, **fields)

    def fail(self, number: int, status: int | None = 1) -> None:
        self.send(LogEvent.RUN_INFO, stats={"train": 1, "total": 1})
        error: Exception = RuleException("CalledProcessError in file train.smk, line 2: a long command")
        if status is not None:
            error.__cause__ = subprocess.CalledProcessError(status, "train")
        self.error(error)
        fields = {"rule_name": "train", "output": ["results/shop/runs/1/model.safetensors"], "log": ["job.log"]}
        self.send(LogEvent.JOB_ERROR, jobid=number, level=logging.ERROR, **fields)

    def error(self, error: Exception) -> None:
        try:
            raise error
        except Exception:
            self.send(LogEvent.ERROR, str(error), logging.ERROR)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_has_a_line_at_its_start_and_one_at_its_end(folder: Path):
    write_json(folder / "split.stage.json", {"peak_memory_mb": 223.4})
    screen = Screen()
    screen.send(LogEvent.RUN_INFO, stats={"split": 1, "train": 2, "total": 3})
    screen.start(4, "split", "split.stage.json", dataset="shop")
    screen.send(None, "Execute 1 jobs...")
    screen.send(LogEvent.JOB_FINISHED, job_id=4)
    assert screen.lines[0] == "3 jobs: split, 2 train"
    assert screen.lines[1].split() == ["start", "split", "shop"]
    assert re.fullmatch(r" *done +split +shop +\d+\.\d s +223 MB +1 of 3", screen.lines[2])
    assert len(screen.lines) == 3 and not screen.original_stream.getvalue()


@pytest.mark.parametrize(
    ("kcore", "ratings", "notes"), [(5, True, "5-core; ratings are no signal"), (0, False, "no k-core")]
)
def test_a_prepared_data_set_is_summed_up(folder: Path, kcore: int, ratings: bool, notes: str):
    counts = {"users": 60, "items": 24, "interactions": 3000}
    stats = counts | {"kcore": kcore, "raw": {"interactions": 3600}, "has_ratings": ratings}
    write_json(folder / "prepare.stage.json", {"stage": "cm3.datasets.prepare", "stats": stats})
    screen = Screen()
    screen.start(1, "prepare", "ratings.parquet", "prepare.stage.json", dataset="shop")
    screen.send(LogEvent.JOB_FINISHED, job_id=1)
    assert screen.lines[-1].strip() == f"60 users, 24 items, 3,000 of 3,600 interactions ({notes})"


def test_commands_are_shown_on_request_only():
    for shows in (False, True):
        screen = Screen(shows_commands=shows)
        screen.start(1, "train", "model", experiment="shop")
        assert ("python -m train" in screen.text) is shows


def test_a_missing_rule_is_no_failure_of_a_job():
    screen = Screen(explain=lambda error: "shap: no such experiment")
    screen.error(MissingRuleException("results/shap/metrics.json"))
    assert screen.lines == ["ERROR: shap: no such experiment"]


def test_a_failure_ends_with_reason_log_and_next_step(folder: Path):
    (folder / "job.log").write_text(LOG)
    screen = Screen()
    screen.start(1, "train", "results/shop/runs/1/model.safetensors", experiment="shop")
    screen.fail(1)
    screen.terminal.report_failures()
    screen.send(None, "Complete log(s): x")
    screen.error(WorkflowError("At least one job did not complete successfully."))
    screen.terminal.close()
    assert screen.lines[-6:] == [
        "train shop failed:",
        "  cm3.training.train: the loss is not finite",
        "in batch 3",
        "  log: job.log",
        "",
        "Correct the cause and type the same command again: it continues where this run stopped.",
    ]
    assert "long command" not in screen.text and "At least one job" not in screen.text
    assert screen.text.count("train shop failed") == 1


@pytest.mark.parametrize(
    ("status", "reason"), [(137, "killed (SIGKILL)"), (-9, "killed (SIGKILL)"), (3, "status 3"), (None, "long command")]
)
def test_a_failure_without_a_log_says_how_the_process_ended(status: int | None, reason: str):
    screen = Screen()
    screen.start(1, "train", "model", experiment="shop")
    screen.fail(1, status)
    screen.terminal.close()  # with --no-hooks nobody asks for the report
    assert "train shop failed" in screen.text and reason in screen.text


def test_ctrl_c_is_no_failure():
    screen = Screen()
    screen.start(1, "train", "model", experiment="shop")
    screen.fail(1, 130)
    screen.terminal.report_failures()
    assert screen.lines[-1].startswith("The run was interrupted. Type the same command again")
    assert "FAILED" not in screen.text and "failed" not in screen.text


def test_a_job_that_succeeds_when_it_is_repeated_is_not_reported():
    screen = Screen()
    for _ in range(2):
        screen.start(1, "train", "model", experiment="shop")
        if not screen.terminal.failed:
            screen.fail(1)
    screen.send(LogEvent.JOB_FINISHED, job_id=1)
    screen.terminal.close()
    assert "train shop failed" not in screen.text


def test_warnings_of_stages_are_collected_once(folder: Path):
    (folder / "job.log").write_text(LOG)
    screen = Screen()
    screen.start(1, "prepare", "items", dataset="shop")
    screen.send(LogEvent.JOB_FINISHED, job_id=1)
    assert screen.terminal.warnings() == ["prepare shop: 46 % of interactions dropped"]
    (folder / "job.log").write_text("".join(f"09:00:00 WARNING a.b: {number}\n" for number in range(9)))
    assert screen.terminal.warnings()[-1] == "prepare shop: and 6 more warnings in job.log"
    assert warnings_in(folder / "absent.log") == []


def test_the_last_error_of_a_log_is_found_whole(folder: Path):
    (folder / "job.log").write_text(LOG)
    assert last_error(folder / "job.log") == "cm3.training.train: the loss is not finite\nin batch 3"
    (folder / "job.log").write_text("bash: python: command not found\n")
    assert last_error(folder / "job.log") == "bash: python: command not found"
    (folder / "job.log").write_text("09:00:00 INFO a.b: epoch 1\n")
    assert last_error(folder / "job.log") is None
    assert last_error(folder / "absent.log") is None


def test_other_commands_of_snakemake_print_as_before():
    screen = Screen(executes=False, forecast=lambda: ["images: 7,050"])
    screen.send(None, "Building DAG of jobs...")
    screen.send(LogEvent.WORKFLOW_STARTED, "SNAKEMAKE")
    screen.send(LogEvent.RUN_INFO, "Job stats", stats={"total": 2})
    screen.send(LogEvent.RUN_INFO, "Job stats", stats={"total": 2})
    assert screen.original_stream.getvalue() == "Building DAG of jobs...\nJob stats\nimages: 7,050\nJob stats\n"
    assert not screen.text


def test_the_cost_is_shown_before_the_first_job():
    screen = Screen(forecast=lambda: ["images: 7,050"])
    screen.send(LogEvent.RUN_INFO, stats={"images": 1, "total": 1})
    assert screen.lines == ["1 jobs: images", "  images: 7,050"]


def test_an_error_of_planning_is_one_line():
    said = "datasets.mine.path: no such file"
    screen = Screen(explain=lambda error: quoted([said, "another"], str(error)) or user_error(error))
    screen.error(WorkflowError(f"Error:\n  UserError: {said}\nWildcards:\n  dataset=mine\nTraceback: ..."))
    assert screen.lines == [f"ERROR: {said}"]


def test_errors_are_explained_by_the_user_error_behind_them():
    outer = RuntimeError("frames")
    outer.__context__ = UserError("rows.csv: line 4")
    assert user_error(outer) == "rows.csv: line 4"
    assert user_error(WorkflowError("refused")) == "refused"
    assert user_error(NameError("x")) is None


def test_quiet_filters_of_snakemake_stay():
    original = logging.StreamHandler(io.StringIO())
    original.addFilter(lambda record: getattr(record, "event", None) != LogEvent.JOB_INFO)
    stream = io.StringIO()
    terminal = Terminal(original, lambda: True, stream=stream)
    record = logging.LogRecord("snakemake", logging.INFO, "", 1, "", (), None)
    vars(record).update(event=LogEvent.JOB_INFO, jobid=1, rule_name="a", output=["x"], log=[], shellcmd="")
    terminal.handle(record)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("left_out", [{LogEvent.JOB_INFO, LogEvent.JOB_ERROR, LogEvent.RUN_INFO}, set(LogEvent)])
def test_a_quiet_run_tells_why_it_failed(left_out):
    Path("job.log").write_text(LOG)
    screen = Screen(left_out=left_out)
    screen.start(1, "train", "results/shop/runs/1/model.safetensors")
    screen.fail(1)
    assert screen.text == ""
    screen.terminal.report_failures()
    assert screen.lines[1] == "train shop failed:"
    assert "the loss is not finite" in screen.lines[2]
    assert screen.lines[-1].startswith("Correct the cause")


def test_quiet_hides_no_error():
    screen = Screen(left_out=set(LogEvent))
    screen.error(WorkflowError("the folder is locked"))
    assert screen.lines == ["the folder is locked"]


def test_nothing_to_do_shows_the_results():
    from snakemake.common import NOTHING_TO_BE_DONE_MSG

    shown = []
    screen = Screen(nothing_to_do=lambda: shown.append(1))
    screen.send(None, NOTHING_TO_BE_DONE_MSG)
    assert shown and screen.lines == [NOTHING_TO_BE_DONE_MSG]


class Tty(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_the_running_jobs():
    screen = Screen()
    screen.stream = screen.terminal.stream = Tty()
    screen.send(LogEvent.RUN_INFO, stats={"train": 1, "total": 1})
    screen.start(1, "train", "model", experiment="shop")
    screen.send(LogEvent.JOB_FINISHED, job_id=1)
    screen.terminal.end()
    assert "0/1 jobs, 00:00, ? left" in screen.text and ", train shop" in screen.text
