"""Profiles are consistent and accepted by Snakemake; the container has the pinned environment."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from checkout import Checkout
from repository import ROOT

PROFILES = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/profile.yaml"))
METRICS = "results/shop/metrics.json"


def profile(name: str) -> dict:
    return yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("profiles") / "shop")


def dry_run(shop: Checkout, name: str, **environment: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{name}", "-n", METRICS]
    answer = subprocess.run(
        command, cwd=shop.folder, env=os.environ | environment, capture_output=True, text=True, timeout=1800
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


@pytest.mark.parametrize("name", ["slurm", "workstation"])
def test_snakemake_accepts_the_profile(shop: Checkout, name: str):
    assert re.search(r"^total +11$", dry_run(shop, name), re.MULTILINE)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_repeat_the_settings_of_the_default(name: str):
    kept = {key: value for key, value in profile("default").items() if key != "resources"}
    assert kept.items() <= profile(name).items()


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_cluster_profiles_set_no_gpu_limit_and_retry_jobs(name: str):
    # A limit on gpu would let one job at a time have one, and clamp what a single job may ask for.
    assert "gpu" not in profile(name).get("resources", {})
    assert profile(name)["retries"] >= 2
    assert not re.search(r"^ +retries:", "".join(p.read_text() for p in rule_files()), re.MULTILINE)


def test_groups_name_existing_rules_and_agree_across_clusters():
    rules = set(
        re.findall(r"^(?:rule|use rule \w+ as) (\w+)", "".join(p.read_text() for p in rule_files()), re.MULTILINE)
    )
    groups = profile("slurm")["groups"]
    assert groups.keys() <= rules
    assert groups == profile("kubernetes")["groups"]
    # Long ones are alone: a group holds what all of its jobs need for as long as the longest chain takes.
    assert not groups.keys() & {"download", "images", "caption", "train"}
    # What a group asks for is settled before its first job runs, and split is judged by the table that prepare leaves.
    assert "split" not in groups


def rule_files() -> list[Path]:
    return sorted((ROOT / "workflow/rules").glob("*.smk"))


@pytest.mark.parametrize("path", rule_files(), ids=lambda path: path.stem)
def test_every_stage_rule_states_memory_and_time(path: Path):
    for rule in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
        if "python -m " in rule:
            assert "mem_mb=needs.mem_mb(" in rule and "runtime=needs.runtime(" in rule, rule.split(":")[0]


class EmptyBucket(BaseHTTPRequestHandler):
    """An empty object storage: enough for a dry run."""

    def answer(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = answer  # noqa: N815

    def log_message(self, *arguments) -> None:
        """Keep the test output clean."""


@pytest.fixture
def storage() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyBucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_kubernetes_files_are_below_the_storage_prefix(shop: Checkout, storage: str):
    output = dry_run(
        shop,
        "kubernetes",
        SNAKEMAKE_STORAGE_S3_ENDPOINT_URL=storage,
        SNAKEMAKE_STORAGE_S3_ACCESS_KEY="key",
        SNAKEMAKE_STORAGE_S3_SECRET_KEY="secret",
    )
    prefix = profile("kubernetes")["default-storage-prefix"]
    files = [
        name for line in re.findall(r"^ +(?:input|output): (.+)$", output, re.MULTILINE) for name in line.split(", ")
    ]
    assert len(files) > 20
    assert all(name.startswith(f"{prefix}/") for name in files)
    assert re.search(r"^total +11$", output, re.MULTILINE)


def test_the_dockerfile_is_clean():
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


def test_the_container_has_the_pins_and_the_python_of_conda():
    dockerfile = (ROOT / "Dockerfile").read_text()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = (
        part.removeprefix("python=") for part in environment["dependencies"] if str(part).startswith("python=")
    )
    assert re.search(r"^FROM python:([\d.]+)-", dockerfile, re.MULTILINE)[1] == python
    assert re.search(r"uv==([\d.]+)", dockerfile)[1] == re.search(r"uv_version=([\d.]+)", (ROOT / "run").read_text())[1]
    copied = set(re.search(r"^COPY (.+) \./$", dockerfile, re.MULTILINE)[1].split())
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept == {"requirements.txt", "requirements-cluster.txt", "constraints.txt"}


def test_a_run_without_containers_ignores_the_image(shop: Checkout):
    output = shop.dry_run("--verbose", METRICS)
    assert "apptainer" not in output.lower().replace("apptainer-", "")
