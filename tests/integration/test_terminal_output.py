"""What a user reads on the terminal: of a run, of a failure, and of a mistyped command."""

from pathlib import Path

import pytest
import yaml
from checkout import METRICS, Checkout, changed

TOO_MANY = {"experiments__shop__model": {"embedding_dim": 16, "knn_k": 75}}


@pytest.fixture
def checkout(finished_checkout: Checkout, tmp_path: Path) -> Checkout:
    return finished_checkout.clone(tmp_path / "copy")


def test_a_run_prints_a_line_a_job_and_what_to_do_next(checkout: Checkout):
    """An option in the place of a config file gives the command of the results."""
    words = "experiments={shop: {training: {lr: 0.003, epochs: 2}}}"
    output = checkout.run(METRICS, "--config", words)
    assert output.count("  start   ") == output.count("  done    ") == 3
    assert len(output.splitlines()) < 40
    assert "INFO" not in output and "Job stats" not in output
    assert f"./run report shop --config '{words}'" in output
    log = max((checkout.folder / ".snakemake/log").glob("*.log"))
    assert "Job stats" in log.read_text() and log.name in output
    assert f"--config '{words}'" in (checkout.folder / METRICS).read_text()
    again = checkout.run(METRICS, "--config", words)
    assert "Nothing to be done" in again and "recall" in again


def test_a_failure_ends_with_its_reason(checkout: Checkout):
    checkout.configure(changed(**TOO_MANY))
    *_, reason, log, _, advice = checkout.run(METRICS, check=False).rstrip().splitlines()
    assert "71 items have a vector, fewer than knn_k = 75" in reason
    assert log.startswith("  log: logs/shop/similarity-looks-")
    assert advice.startswith("Correct the cause and type the same command again")
    assert "Error in rule similarity" in checkout.run("--verbose", METRICS, check=False)


def test_mistakes_on_the_command_line_are_one_line(checkout: Checkout):
    assert "shap: no such experiment or study (did you mean 'shop'?)" in checkout.run(
        "results/shap/metrics.json", check=False
    )
    swallowed = checkout.run("--configfile", "config/config.yaml", METRICS, check=False)
    assert "--configfile takes" in swallowed.splitlines()[-1]
    missing = changed()
    missing["datasets"]["shop"] = {"source": "files", "interactions": {"path": "absent.csv"}}
    (checkout.folder / "missing.yaml").write_text(yaml.safe_dump(missing))
    planning = checkout.run("--configfile", "missing.yaml", "--", METRICS, check=False)
    assert "ERROR: datasets.shop" in planning and "Traceback" not in planning
