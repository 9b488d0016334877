"""The machine and the commit in the records of stages."""

import os
import subprocess

from cm3.common.origin import commit, machine


def test_the_machine_is_named_without_its_host():
    text = machine()
    assert f"{os.cpu_count()} cores" in text and " GB, " in text
    assert os.uname().nodename not in text


def test_the_commit_says_whether_files_differ_from_it(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) is None, "no checkout"
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    commit.cache_clear()
    assert commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("two")
    commit.cache_clear()
    assert commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"
