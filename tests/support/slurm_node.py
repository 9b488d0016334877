"""A SLURM of one node for a test: munged, slurmctld and slurmd from Debian's packages, without systemd or a database.

Everything it writes is in one folder under /tmp; nothing under /etc or /var is read or changed, and its ports are free
ones, so that it can run next to a real installation and next to another copy of itself.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "squeue", "scontrol", "srun", "scancel", "sinfo")

# What makes the node larger than the machine: the jobs' requests are what is tested, not whether they fit.
CPUS, MEMORY_MB = 32, 256_000

CONFIG = """\
ClusterName=cm3
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MinJobAge=7200
KillWait=5
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:1
PartitionName=main Nodes={host} Default=YES MaxTime=7-00:00:00 State=UP
"""


def why_not() -> str | None:
    """Return what a one-node SLURM lacks here, None where it can be had."""
    if os.getuid() != 0:
        return "a SLURM of one's own needs root"
    missing = [name for name in DAEMONS + COMMANDS if _program(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None


class SlurmNode:
    """A running cluster of one node.

    Attributes:
        folder: its configuration, spool and logs.
        environment: what a process needs to reach it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        controller_port, node_port = _free_ports(2)
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
        self.config = folder / "slurm.conf"
        self.config.write_text(
            CONFIG.format(
                folder=folder,
                host=host,
                controller_port=controller_port,
                node_port=node_port,
                cpus=CPUS,
                memory=MEMORY_MB,
            )
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # The executor runs a job's srun without SLURM_CONF, as if the configuration always lay in /etc.
        (folder / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={self.config} exec {_program("srun")} "$@"\n')
        (folder / "bin/srun").chmod(0o755)
        path = f"{folder}/bin:{os.environ.get('PATH', os.defpath)}"
        self.environment = inherited | {"SLURM_CONF": str(self.config), "PATH": path}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        options = (
            f"--{name}={self.folder}/munge{end}"
            for name, end in (
                ("socket", ".socket"),
                ("key-file", ".key"),
                ("pid-file", ".pid"),
                ("log-file", ".log"),
                ("seed-file", ".seed"),
            )
        )
        self._daemon("munged", "--foreground", "--force", *options)
        self._wait_for("munged", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        self._wait_for("slurmctld", lambda: "UP" in self.ask("scontrol", "ping", check=False))
        self._daemon("slurmd", "-D")
        self._wait_for("slurmd", lambda: self.ask("sinfo", "--noheader", "--format=%T", check=False).strip() == "idle")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and whatever else was started by them; remove the folder."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.ask("scancel", "--user=root", check=False)
            until(lambda: not self.ask("squeue", "--noheader", check=False).strip(), 60)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # A step's keeper detaches itself from slurmd; it is known by the configuration that it runs with.
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until(lambda: not self.processes(), 60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """Return the ids of all processes that run with this cluster's configuration, but for this one."""
        mark, found = f"SLURM_CONF={self.config}".encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return [process for process in found if process != os.getpid()]

    def ask(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return what it prints."""
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)
        assert not check or answer.returncode == 0, answer.stderr
        return answer.stdout

    def jobs(self) -> dict[str, dict[str, str]]:
        """Return the fields of `scontrol show job` for each job that the controller remembers, ended ones included."""
        shown = self.ask("scontrol", "show", "job", "--oneliner", check=False)
        found = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines() if line.startswith("JobId="))
        return {job["JobId"]: job for job in found}

    def _daemon(self, name: str, *options: str) -> None:
        program = _program(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("wb") as output:
            daemon = subprocess.Popen(
                [program, *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._daemons.append(daemon)

    def _wait_for(self, name: str, ready) -> None:
        until(lambda: self._daemons[-1].poll() is not None or ready(), 300)
        if self._daemons[-1].poll() is not None or not ready():
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob(f"{name}*.[lo]*"))
            raise RuntimeError(f"{name} did not come up:\n{logs}")


@contextlib.contextmanager
def one_node() -> Iterator[SlurmNode]:
    """Bring up a cluster of one node, and take all of it down again, whatever happens."""
    # Not under pytest's folder: a socket's path may have 107 characters only.
    node = SlurmNode(Path(tempfile.mkdtemp(prefix="cm3-slurm-", dir="/tmp")))
    try:
        node.start()
        yield node
    finally:
        node.stop()


def _end_with_parent() -> None:
    """Let the kernel end this process when the test is killed, too hard to take anything down itself."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
