"""The command line of every stage: `python -m STAGE --spec JSON --input name=path --output name=path`."""

import argparse
import contextlib
import json
import logging
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from cm3.common.errors import UserError
from cm3.common.files import exclusive, read_json, remove_stale_parts, write_json
from cm3.common.gpus import own_gpus
from cm3.common.torchrun import started_by_torchrun, torchrun_rank

log = logging.getLogger("stage")


@dataclass
class Call:
    """What a stage was asked to do.

    Attributes:
        spec: the settings that change the output, exactly those that the stage uses.
        runtime: settings that change speed or place only: device, batch size, threads.
        inputs, outputs: paths by name.
        code: digest of the code that runs, for provenance.
        record: facts for the stage's record file; the stage adds its own.
    """

    spec: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    code: str
    record: dict[str, Any] = field(default_factory=dict)


class Several:
    """A stage in several processes (runtime `processes`): one starts them and holds the GPUs, the first of them writes.

    Attributes:
        started: this is one of those that torchrun started.
        rank: its number.
        writes: it holds the lock of the outputs, and writes outputs and record.
    """

    def __init__(self, processes: int) -> None:
        self.started = started_by_torchrun()
        self.rank = torchrun_rank()
        self.writes = self.rank == 0 and (self.started or processes == 1)


@contextlib.contextmanager
def stage(name: str) -> Iterator[Call]:
    """Parse the command line, run the body with logging set up, and write the record of time and memory.

    The record (output `record`, if asked for) holds wall_seconds, peak_memory_mb, started, versions and what
    the body put into `call.record`. Of several processes (`Several`) the first one
    writes. A UserError, Ctrl-C or SIGTERM ends the process with a message of one line
    and status 1, 130 or 143; partial results stay where the stage resumes from.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}")
    parser.add_argument("--spec", type=json.loads, default={}, metavar="JSON", help="settings that change the output")
    parser.add_argument(
        "--runtime", type=json.loads, default={}, metavar="JSON", help="settings that change speed only"
    )
    parser.add_argument("--input", action="append", default=[], type=_pair, metavar="NAME=PATH")
    parser.add_argument("--output", action="append", default=[], type=_pair, metavar="NAME=PATH")
    parser.add_argument("--code", default="", help="digest of the code, kept as provenance")
    parser.add_argument("--log", type=Path, help="file that the log goes to, beside the terminal")
    parser.add_argument(
        "--call", type=Path, metavar="FILE", help="JSON of all these, for more than a command line holds"
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help="where the inputs of --call lie")
    arguments = parser.parse_args()
    call = Call(arguments.spec, arguments.runtime, dict(arguments.input), dict(arguments.output), arguments.code)
    if arguments.call:
        told = read_json(arguments.call)
        inputs = {name: arguments.root / path for name, path in told["inputs"].items()}
        outputs = {name: Path(path) for name, path in told.get("outputs", {}).items()} | call.outputs
        call = Call(told["spec"], told["runtime"], inputs, outputs, told["code"])
    several = Several(call.runtime.get("processes", 1))
    _configure_logging(None if several.rank else arguments.log, several)
    signal.signal(signal.SIGTERM, _terminate)
    if os.environ.get("CM3_STOP_WITH_PARENT") or several.started:
        threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    started, clock = time.time(), time.perf_counter()
    written = list(call.outputs.values()) if several.writes else []
    lock = exclusive(written[0].parent / f".{written[0].name}.lock") if written else contextlib.nullcontext()
    try:
        # How many GPUs the job may take is the workflow's business, and none of the stage's settings.
        gpus = call.runtime.pop("gpus", None)
        with logging_redirect_tqdm(), lock, own_gpus(None if several.started else gpus):
            for output in written:
                remove_stale_parts(output)
            yield call
            path = call.outputs.get("record")
            if path and several.writes:
                call.record.update(
                    stage=name,
                    started=started,
                    wall_seconds=time.perf_counter() - clock,
                    peak_memory_mb=peak_memory_mb(),
                    code=call.code,
                    versions=versions(),
                )
                write_json(path, call.record)
        log.info("%s: done in %.1f s, %.0f MB at peak", name, time.perf_counter() - clock, peak_memory_mb())
    except UserError as error:
        log.error("%s: %s", name, error)
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("%s: interrupted; run the same command again to go on", name)
        sys.exit(130)


def _pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def _configure_logging(path: Path | None, several: Several) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appended to, as several processes may write to it; the one that starts them empties it.
        path.open("a" if several.started else "w").close()
        handlers.append(logging.FileHandler(path, mode="a", encoding="utf-8"))
    logging.basicConfig(
        level=logging.WARNING if several.rank else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _stop_with_parent(parent: int) -> None:
    # Under Snakemake a job must not outlive a killed run: the next run would meet it at the same files.
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


_PROVENANCE = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "open_clip_torch",
    "timm",
    "vllm",
    "pillow",
    "pyarrow",
    "numpy",
    "scipy",
    "scikit-image",
    "snakemake",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PROVENANCE:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
