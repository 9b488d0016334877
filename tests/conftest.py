"""Fixtures that several test files share: the real data where it is at hand, and a checkout to run the DAG in."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
