"""Markers by folder, and fixtures shared by several test files: real data and a finished checkout."""

import os
import signal
from pathlib import Path

import pytest
from checkout import METRICS, Checkout
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# In the order in which they run: what takes longest comes first, so that no worker is left with it at the end.
PARTS = ("gpu", "cluster", "integration", "browser", "unit")

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Prepare the process that tests run in, whether it is the only one or a worker of xdist.

    A worker's share of the cores goes to torch and to the processes that tests start; without a limit each of n workers
    would start n threads. And a job that a shell starts in the background inherits SIGINT ignored, as would every process
    started by a test that sends SIGINT.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the part of the suite that it belongs to, and order the parts.

    A test belongs to the part that its folder is named after, unless it has the marker of another part.
    """
    for item in items:
        folder, *_ = item.path.relative_to(ROOT / "tests").parts
        if not any(item.get_closest_marker(part) for part in PARTS):
            item.add_marker(folder)
    items.sort(key=lambda item: next(n for n, part in enumerate(PARTS) if item.get_closest_marker(part)))


@pytest.fixture(scope="session")
def finished_checkout(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Checkout:
    """The small experiment of `checkout.py`, run to its end once per session; tests change clones of it.

    All workers of xdist share it: the first one to ask for it runs it, the others wait.
    """
    session = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder, done = session / "finished", session / "finished.done"
    with FileLock(session / "finished.lock"):
        if not done.exists():
            checkout = Checkout(folder)
            checkout.run(METRICS)
            done.touch()
    return Checkout.at(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; CM3_TEST_DATA names another one."""
    folder = Path(os.environ.get("CM3_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real data are not at {folder} (set CM3_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def hm(real_data: Path) -> Path:
    """The fashion shop: interactions.tsv.gz, items.jsonl, images/."""
    folder = real_data / "hm"
    if not folder.is_dir():
        pytest.skip(f"the hm data are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """The folder of real image encoder weights."""
    folder = real_data.parent / "weights"
    if not folder.is_dir():
        pytest.skip(f"real weights are not at {folder}")
    return folder


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a formula is compared with its oracle on; `cuda` is skipped on a machine without a GPU."""
    if request.param == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU")
    return str(request.param)
