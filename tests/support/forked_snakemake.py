"""Runs `snakemake` commands in forks of one process that has imported it: a dry run then takes less than half the time.

Only Snakemake and its plugins are imported beforehand. The code of a checkout is imported by each fork, from that checkout.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import gettempdir


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=gettempdir(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # closes its input, upon which it ends
    return server


def forked_snakemake(folder: Path, arguments: list[str], environment: dict[str, str], output: Path) -> int:
    """Run `snakemake ARGUMENTS` in `folder`, its output to a file, and return its exit status."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    request = {"folder": str(folder), "arguments": arguments, "environment": environment, "output": str(output)}
    print(json.dumps(request), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, "the process that forks Snakemake has ended"
    return int(answer)


def _fork(folder: str, arguments: list[str], environment: dict[str, str], output: str) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
            os.dup2(source, stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["snakemake", *arguments]
        # as `python -m` does, where this script has its own folder
        sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        from snakemake.cli import main

        main()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve() -> None:
    from snakemake.cli import get_argument_parser

    get_argument_parser()  # finds the plugins
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(_fork(**json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
