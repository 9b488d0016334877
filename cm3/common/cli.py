"""The command line of every stage: `python -m STAGE --spec JSON --input name=path --output name=path`."""

import argparse
import contextlib
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cm3.common.process_exit import skip_teardown  # isort: skip  before modules that register exit handlers
from tqdm.contrib.logging import logging_redirect_tqdm

from cm3.common.errors import DamagedFileError, UserError, path_fault
from cm3.common.files import exclusive, read_json, remove_stale_parts, write_json
from cm3.common.gpus import own_gpus
from cm3.common.inputs import Watch, check_made_from
from cm3.common.ledger import Ledger
from cm3.common.limits import Limits
from cm3.common.origin import commit, machine
from cm3.common.stages import STAGES
from cm3.common.torchrun import started_by_torchrun, torchrun_rank
from cm3.common.usage import Usage

log = logging.getLogger("stage")


@dataclass
class Call:
    """The arguments of one job of a stage.

    Attributes:
        spec: the settings that change the output, exactly those that the stage uses.
        runtime: settings that change speed or location only: device, batch size, threads.
        inputs, outputs: paths by name.
        code: version of the stage and its parts, for provenance.
        libraries: distributions that the outputs of the parts depend on, besides those of the stage.
        identity: settings and version, by which the workflow decides whether the outputs are up to date.
        made_from: settings of this stage and of those before it, for tables whose names do not tell them.
        expected: `made_from` that inputs of such names must have, by the name of the input.
        record: facts for the stage's record file; the stage adds its own.
        parts: files besides the outputs that belong to them and have no name of their own in the workflow, such as shards.
        limits: threads and memory of the job.
    """

    spec: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    code: str
    libraries: list[str] = field(default_factory=list)
    identity: str = ""
    made_from: dict[str, str] = field(default_factory=dict)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    parts: list[Path] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)


class ProcessRole:
    """The role of this process in a stage that runs in several (runtime `processes`).

    The first process starts the others with torchrun and holds the GPUs; the one of rank 0 writes.

    Attributes:
        started: torchrun started this process.
        rank: its number among those that torchrun started.
        writes: it holds the lock of the outputs, and writes outputs and record.
    """

    def __init__(self, processes: int) -> None:
        self.started = started_by_torchrun()
        self.rank = torchrun_rank()
        self.writes = self.rank == 0 and (self.started or processes == 1)


@contextlib.contextmanager
def stage(name: str) -> Iterator[Call]:
    """Parse the command line, run the body with logging set up, and write the stage's record.

    The record (output `record`, if given) holds time and memory (`cm3.common.usage`), started, code, device, threads, the
    versions of the libraries of the stage and its parts, machine, commit of the source, and what the body added to `call.record`; a body that uses another device
    than the CPU adds `device`. A UserError, Ctrl-C or SIGTERM ends the process with a message of one line and status 1,
    130 or 143; any other error with its traceback and status 1; partial results stay for the stage to resume from.

    Args:
        name: the stage's module.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}")
    parser.add_argument("--spec", type=json.loads, default={}, metavar="JSON", help="settings that change the output")
    parser.add_argument(
        "--runtime", type=json.loads, default={}, metavar="JSON", help="settings that change speed only"
    )
    parser.add_argument("--input", action="append", default=[], type=_pair, metavar="NAME=PATH")
    parser.add_argument("--output", action="append", default=[], type=_pair, metavar="NAME=PATH")
    parser.add_argument("--code", default="", help="version of the stage and its parts, kept as provenance")
    parser.add_argument(
        "--library", action="append", default=[], metavar="NAME", help="library whose version is recorded, too"
    )
    parser.add_argument(
        "--identity", default="", help="settings and version that decide whether outputs are up to date"
    )
    parser.add_argument(
        "--made-from", type=json.loads, default={}, metavar="JSON", help="settings of this stage and of those before it"
    )
    parser.add_argument(
        "--expected",
        type=json.loads,
        default={},
        metavar="JSON",
        help="settings that inputs must be made from, by name",
    )
    parser.add_argument("--log", type=Path, help="file for the log, which also goes to the terminal")
    parser.add_argument(
        "--call", type=Path, metavar="FILE", help="JSON of these arguments, if they are too long for a command line"
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help="folder of the inputs of --call")
    arguments = parser.parse_args()
    inputs, outputs = dict(arguments.input), dict(arguments.output)
    made = (arguments.identity, arguments.made_from, arguments.expected)
    call = Call(arguments.spec, arguments.runtime, inputs, outputs, arguments.code, arguments.library, *made)
    if arguments.call:
        given = read_json(arguments.call)
        inputs = {name: arguments.root / path for name, path in given["inputs"].items()}
        outputs = {name: Path(path) for name, path in given.get("outputs", {}).items()} | outputs
        call = Call(
            given["spec"],
            given["runtime"] | arguments.runtime,
            inputs,
            outputs,
            given["code"],
            arguments.library,
            *made,
        )
    role = ProcessRole(call.runtime.get("processes", 1))
    _configure_logging(None if role.rank else arguments.log, role)
    signal.signal(signal.SIGTERM, _terminate)
    if os.environ.get("CM3_STOP_WITH_PARENT") or role.started:
        threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    started = time.time()
    written = list(call.outputs.values()) if role.writes else []
    lock = exclusive(written[0].parent / f".{written[0].name}.lock") if written else contextlib.nullcontext()
    try:
        # The GPUs and the memory that the workflow allots to the job; stages have no such settings.
        gpus = call.runtime.pop("gpus", None)
        call.limits = Limits(call.runtime.get("threads"), call.runtime.pop("mem_mb", None))
        call.limits.apply()
        note = written[0].parent / f".{written[0].name}.usage" if written else None
        own = own_gpus(None if role.started else gpus)
        # Bars are drawn on a terminal alone.
        bars = logging_redirect_tqdm() if sys.stderr.isatty() else contextlib.nullcontext()
        with bars, lock, own, Usage(note, f"{name} {call.identity}") as usage:
            for output in written:
                remove_stale_parts(output)
            watch = Watch(call.inputs)
            for input_name, settings in call.expected.items():
                check_made_from(call.inputs[input_name], settings)
            yield call
            watch.check()
            path = call.outputs.get("record")
            if path and role.writes:
                defaults = {"device": "cpu", "threads": call.runtime.get("threads") or os.cpu_count()}
                call.record = defaults | call.record
                call.record.update(
                    stage=name,
                    started=started,
                    **usage.facts(),
                    code=call.code,
                    versions=versions(_libraries(name, call)),
                    machine=machine(),
                    commit=commit(),
                )
                write_json(path, call.record)
            if call.identity and role.writes:
                _enter_outputs(call)
            used = usage.facts()
        log.info("%s: done in %.1f s, %.0f MB at peak", name, used["wall_seconds"], used["peak_memory_mb"])
        if not role.started:
            skip_teardown(name)
    except DamagedFileError as error:
        if Ledger().mark_damaged(_as_named(error.path), error.reason):
            log.error(
                "%s: %s: damaged (%s). It is marked: run the same command again, which makes the file anew and goes on",
                *(name, error.path, error.reason),
            )
        else:
            log.error("%s: %s", name, error)
        sys.exit(1)
    except UserError as error:
        log.error("%s: %s", name, error)
        sys.exit(1)
    except OSError as error:
        fault = path_fault(error)
        if fault is None:
            log.exception("%s: %s: %s", name, type(error).__name__, error)
        else:
            log.error("%s: %s", name, fault)
        sys.exit(1)
    except Exception as error:
        log.exception("%s: %s: %s", name, type(error).__name__, error)
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("%s: interrupted; run the same command again to go on", name)
        sys.exit(130)


def _enter_outputs(call: Call) -> None:
    """Enter outputs and parts in the ledger, so that later runs notice a change of them and need not read them again."""
    ledger = Ledger()
    outputs = tuple(str(path) for path in call.outputs.values())
    inputs = {str(path): ledger.sha256(path) for path in call.inputs.values() if path.is_file()}
    files = [*call.outputs.values(), *call.parts]
    folders = [path for path in files if path.is_dir()]
    files += [path for folder in folders for path in sorted(folder.rglob("*"))]
    for path in files:
        # Paths of an object storage are copies of this job alone.
        if path.is_file() and not path.is_absolute() and path.parts[0] != ".snakemake":
            ledger.record(path, call.identity, outputs, inputs)
    if call.parts or folders:
        ledger.forget_others(outputs, {str(path) for path in files})


def _as_named(path: Path) -> Path:
    """Return a path as the workflow names it: relative to the folder of the project."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _libraries(module: str, call: Call) -> list[str]:
    of_stage = (stage.libraries for stage in STAGES.values() if stage.module == module)
    return sorted({*next(of_stage, ()), *call.libraries})


def _pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def _configure_logging(path: Path | None, role: ProcessRole) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    to_file = path is not None and bool(os.environ.get("CM3_LOG_TO_FILE"))
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for appending, because several processes may write to it; the first one empties it.
            path.open("a" if role.started else "w").close()
            file = logging.FileHandler(path, mode="a", encoding="utf-8")
        except OSError as error:
            sys.exit(f"ERROR: {path_fault(error) or error}")
        if to_file:
            # What libraries, child processes and the interpreter write is in the log, too.
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), 2)
        handlers = [file] if to_file else [*handlers, file]
    logging.basicConfig(
        level=logging.WARNING if role.rank else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _stop_with_parent(parent: int) -> None:
    # A job must not outlive a killed Snakemake: the next run would write to the same files.
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those of `libraries` that are installed, by the name of the distribution."""
    found = {"python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
