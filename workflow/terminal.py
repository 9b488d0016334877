"""Terminal output of a run: a line for each job as it starts and ends, an overall bar, and the reasons of failures.

Snakemake's own messages stay in its log file. `--verbose` shows them on the terminal instead.
"""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from snakemake.exceptions import MissingRuleException, RuleException, WorkflowError
from snakemake_interface_logger_plugins.common import LogEvent
from tqdm import tqdm

from cm3.common.errors import UserError
from cm3.common.files import read_json
from workflow.snakemake_internals import A_JOB_FAILED, NOTHING_TO_DO
from workflow.stage_logs import last_error, warnings_in

REFRESH_SECONDS = 1.0
NEXT_STEP = "Correct the cause and type the same command again: it continues where this run stopped."
INTERRUPTED = "The run was interrupted. Type the same command again: it continues where this run stopped."


@dataclass
class Job:
    """One job of the run.

    Attributes:
        label: rule, dataset or experiment, and what else tells it from other jobs of the rule.
        logs: its log files.
        record: its stage's record of time and memory, None without one.
        started: time.monotonic() of its start.
    """

    label: str
    logs: Sequence[Path] = ()
    record: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Terminal(logging.Handler):
    """Handler of Snakemake's log records that takes the place of its terminal output.

    Attributes:
        running: jobs by their number in Snakemake.
        failed: jobs that failed and were not repeated with success, with the reason that Snakemake has.
        finished: jobs that succeeded.
        reasons: what Snakemake says about jobs that failed.
        interrupted: a job ended by Ctrl-C.
    """

    def __init__(
        self,
        original: logging.Handler,
        executes: Callable[[], bool],
        explain: Callable[[BaseException], str | None] = lambda error: None,
        nothing_to_do: Callable[[], None] = lambda: None,
        forecast: Callable[[], Sequence[str]] = tuple,
        shows_commands: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            original: Snakemake's handler, which gets the records of dry runs and listings.
            executes: returns whether jobs are being run.
            explain: returns a message in place of Snakemake's for an error, None where Snakemake's is kept.
            nothing_to_do: prints the results that are up to date.
            forecast: returns what the planned jobs cost.
            shows_commands: print the shell command of each job.
            stream: default: stderr.
        """
        super().__init__()
        self.original, self.executes, self.explain = original, executes, explain
        self.nothing_to_do, self.forecast = nothing_to_do, forecast
        self.shows_commands = shows_commands
        self.stream = stream or sys.stderr
        self.running: dict[int, Job] = {}
        self.failed: dict[int, Job] = {}
        self.finished: list[Job] = []
        self.reasons: list[str] = []
        self.interrupted = False
        self._done, self._total = 0, 0
        self._reported = False
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()
        self._muted = False
        # Those of `--quiet`. What they leave out is not printed, but counts: errors and failures are always reported.
        self._printed = logging.Filterer()
        for rule in original.filters:
            self._printed.addFilter(rule)

    def emit(self, record: logging.LogRecord) -> None:
        """Print what a record means for the user."""
        event = getattr(record, "event", None)
        self._muted = event != LogEvent.ERROR and not self._printed.filter(record)
        try:
            if event == LogEvent.ERROR:
                self._error(record, sys.exc_info()[1])
            elif self._muted and not (event in _EVENTS and self.executes()):
                return
            elif not self.executes():
                if not _says_nothing(record):
                    self.original.handle(record)  # of `--dry-run`, `--summary` and the like
                if event == LogEvent.RUN_INFO and self._total == 0:
                    self._total = vars(record).get("stats", {}).get("total", 0)
                    for line in self.forecast():
                        self.original.handle(logging.LogRecord("cm3", logging.INFO, "", 0, line, (), None))
            elif event in _EVENTS:
                _EVENTS[event](self, record)
            elif record.getMessage() == NOTHING_TO_DO:
                self.show(NOTHING_TO_DO)
                self.nothing_to_do()
            elif event is None and record.levelno >= logging.WARNING and record.getMessage() != A_JOB_FAILED:
                self.show(f"{record.levelname}: {record.getMessage()}")
        except Exception:
            self.handleError(record)
        finally:
            self._muted = False

    def show(self, text: str) -> None:
        """Print lines above the bar, unless they are of a record that `--quiet` leaves out."""
        if self._muted:
            return
        with tqdm.external_write_mode(file=self.stream):
            print(text, file=self.stream, flush=True)

    # Events of Snakemake

    def _plan(self, record: logging.LogRecord) -> None:
        stats: Mapping[str, int] = getattr(record, "stats", {})
        self._total = stats.get("total", 0)
        jobs = ", ".join(f"{count} {rule}" if count > 1 else rule for rule, count in stats.items() if rule != "total")
        self.show(f"{self._total} jobs: {jobs}")
        for line in self.forecast():
            self.show(f"  {line}")
        if self.stream.isatty() and not self._muted:
            self._bar = tqdm(
                total=self._total,
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
                smoothing=0,
                bar_format="{percentage:3.0f} % |{bar}| {n}/{total} jobs, {elapsed}, {remaining} left{postfix}",
            )
            threading.Thread(target=self._refresh, daemon=True).start()

    def _start(self, record: logging.LogRecord) -> None:
        fields = vars(record)
        if not fields["output"]:
            return  # a target rule
        job = job_of(fields)
        self.running[fields["jobid"]] = job
        self.show(f"  start   {job.label}")
        if self.shows_commands and fields["shellcmd"]:
            self.show(f"          {fields['shellcmd']}")
        self._name_running()

    def _finish(self, record: logging.LogRecord) -> None:
        number = vars(record)["job_id"]
        self.failed.pop(number, None)
        self._done += 1
        job = self.running.pop(number, None)
        if job:
            self.finished.append(job)
            facts = record_of(job)
            self.show(f"  done    {job.label:<44}{cost_of(job, facts):>18}   {self._done} of {self._total}")
            if found := tables_of(facts):
                self.show(f"          {found}")
        if self._bar is not None:
            self._bar.update()
        self._name_running()

    def _fail(self, record: logging.LogRecord) -> None:
        self._failed_job(vars(record))

    def _fail_group(self, record: logging.LogRecord) -> None:
        for fields in vars(record)["job_error_info"]:
            self._failed_job(fields)

    def _failed_job(self, fields: Mapping[str, Any]) -> None:
        number = fields["jobid"]
        job = self.running.pop(number, None) or job_of(fields)
        job.logs = [Path(path) for path in fields.get("log") or ()]
        self.failed[number] = job
        self.show(f"  {'stopped' if self.interrupted else 'FAILED ':<7} {job.label:<44}{job.seconds:>12.1f} s")
        self._name_running()

    def _error(self, record: logging.LogRecord, error: BaseException | None) -> None:
        if self._reported:
            return  # that a job has failed was reported with its reason
        if self._total and isinstance(error, RuleException) and not isinstance(error, MissingRuleException):
            status = status_of(error)
            self.interrupted |= status in _INTERRUPTED
            self.reasons.append(record.getMessage() if status is None else _reason(status))
            return
        found = self.explain(error) if error else None
        if found is None and self.failed:
            self.reasons.append(record.getMessage())
            return
        self._close_bar()
        self.show(f"ERROR: {found}" if found else record.getMessage())

    # The end of a run

    def warnings(self) -> list[str]:
        """Return the warnings in the logs of the jobs of this run, each with the job that it comes from."""
        jobs = [*self.finished, *self.failed.values()]
        return [f"{job.label}: {text}" for job in jobs for log in job.logs for text in warnings_in(log)]

    def report_failures(self) -> None:
        """Print for each failed job the last error in its log, the log's path and the next step."""
        self._close_bar()
        self._reported = True
        if self.interrupted or not (self.failed or self.reasons):
            self.show(f"\n{INTERRUPTED}")
            return
        for job in self.failed.values():
            reason = next(filter(None, map(last_error, job.logs)), None) or "; ".join(self.reasons)
            self.show(f"\n{job.label} failed:\n  {reason or 'it ended without a message'}")
            for log in filter(Path.exists, job.logs):
                self.show(f"  log: {log}")
        if not self.failed:
            self.show("\n" + "\n".join(self.reasons))
        self.show(f"\n{NEXT_STEP}")

    def end(self) -> None:
        """Remove the bar: what follows is a summary."""
        self._close_bar()

    def close(self) -> None:
        """Report failures that nobody has reported, as with `--no-hooks`, and end the thread of the bar."""
        if self.failed and not self._reported:
            self.report_failures()
        self._close_bar()
        super().close()

    # The bar

    def _name_running(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(job.label for job in self.running.values())[:60], refresh=True)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            if self._bar is not None:
                self._bar.refresh()

    def _close_bar(self) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_INTERRUPTED = (130, -2)
_EVENTS: dict[LogEvent, Callable[[Terminal, logging.LogRecord], None]] = {
    LogEvent.RUN_INFO: Terminal._plan,
    LogEvent.JOB_INFO: Terminal._start,
    LogEvent.JOB_FINISHED: Terminal._finish,
    LogEvent.JOB_ERROR: Terminal._fail,
    LogEvent.GROUP_ERROR: Terminal._fail_group,
}


def _says_nothing(record: logging.LogRecord) -> bool:
    """Return whether a record before the first job is about the machine alone."""
    event = getattr(record, "event", None)
    return event == LogEvent.WORKFLOW_STARTED or (
        event is None and record.levelno < logging.WARNING and record.module == "api"
    )


def job_of(fields: Mapping[str, Any]) -> Job:
    """Return the job of a record: its rule and wildcards, its logs, and its stage's record."""
    wildcards = dict(fields.get("wildcards") or {})
    named = [
        str(wildcards[name]) for name in ("experiment", "study", "dataset", "extractor", "file") if name in wildcards
    ]
    if not wildcards:
        # an error has no wildcards; its outputs are in the folder of the dataset or experiment
        named = [Path(path).parts[1] for path in fields["output"][:1] if len(Path(path).parts) > 1]
    record = next((Path(path) for path in fields["output"] if path.endswith(".stage.json")), None)
    if record is None and "file" in wildcards:
        record = Path(f"{fields['output'][0]}.stage.json")
    return Job(" ".join([fields["rule_name"], *named]), [Path(path) for path in fields.get("log") or ()], record)


def record_of(job: Job) -> dict[str, Any]:
    """Return the stage's record of a finished job, empty without one."""
    try:
        return read_json(job.record) if job.record else {}
    except UserError:
        return {}


def cost_of(job: Job, record: Mapping[str, Any]) -> str:
    """Return seconds of a finished job, and its peak memory from the stage's record."""
    memory = record.get("peak_memory_mb")
    return f"{job.seconds:.1f} s" + (f" {memory:>6.0f} MB" if memory else " " * 10)


def tables_of(record: Mapping[str, Any]) -> str | None:
    """Return what is in the tables that the prepare stage wrote, from its record; None for other stages."""
    if record.get("stage") != "cm3.datasets.prepare" or "stats" not in record:
        return None
    stats = record["stats"]
    k, read = stats["kcore"], stats["raw"]["interactions"]
    notes = [f"{k}-core" if k > 1 else "no k-core", *(["ratings are no signal"] if stats["has_ratings"] else [])]
    counts = f"{stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} of {read:,} interactions"
    return f"{counts} ({'; '.join(notes)})"


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from or while handling, the outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def status_of(error: BaseException) -> int | None:
    """Return the exit status of the process of a job, the number of a signal as negative; None for other errors."""
    return next((part.returncode for part in chain_of(error) if isinstance(part, subprocess.CalledProcessError)), None)


def _reason(status: int) -> str:
    if status in (-9, 137):
        return "it was killed (SIGKILL), as happens where memory runs out"
    return f"it ended with status {status}"


def quoted(messages: Sequence[str], text: str) -> str | None:
    """Return those of `messages` that a text holds, however it wraps and indents them; None if it holds none."""
    words = " ".join(text.split())
    return "\n".join(dict.fromkeys(m for m in messages if " ".join(m.split()) in words)) or None


def user_error(error: BaseException) -> str | None:
    """Return the message of the UserError behind an error of Snakemake, or of a WorkflowError; None for other errors."""
    for part in chain_of(error):
        if isinstance(part, UserError):
            return str(part)
    return str(error) if type(error) is WorkflowError else None
