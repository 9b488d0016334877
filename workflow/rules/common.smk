import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(str(workflow.current_basedir)).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.errors import UserError
from workflow.config import load_config
from workflow.plan import Plan, canonical
from workflow.working_directory import (
    RunLock,
    keep_metadata_with_data,
    lend_environment_to_jobs,
)
from workflow.summary import print_summary


configfile:
    "config/config.yaml"
    if Path("config/config.yaml").exists()
    else str(ROOT / "config/config.yaml")


try:
    plan = Plan(load_config(config), ROOT)
except UserError as error:
    raise WorkflowError(f"The configuration is refused:\n{error}") from None

lend_environment_to_jobs(ROOT)
keep_metadata_with_data()
run_lock = RunLock()


def one_of(names):
    return "|".join(names) or "(?!)"


wildcard_constraints:
    dataset=one_of(plan.config.datasets),
    extractor=one_of(plan.config.extractors),
    experiment=one_of(plan.config.experiments),
    key="[0-9a-f]{12}",
    run="[0-9a-f]{12}",
    knn_k="[0-9]+",


# `items` is a method of Snakemake's named lists, so the item table goes by `items_` within rules.
def named(paths):
    return {"items_" if name == "items" else name: path for name, path in paths.items()}


def named_files(wildcards, input, output):
    given = [("--input", name, path) for name, path in input.items()]
    given += [("--output", name, path) for name, path in output.items()]
    return " ".join(
        f"{option} {shlex.quote(name.rstrip('_') + '=' + path)}"
        for option, name, path in given
    )


onstart:
    run_lock.acquire()


onsuccess:
    print_summary(plan.config.experiments, run_lock.since)
