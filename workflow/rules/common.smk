import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(str(workflow.current_basedir)).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.gpus import gpu_here
from cm3.common.keys import canonical_json
from workflow.plan.config import load_config
from workflow.plan.migrate import migrate_records
from workflow.plan.runs import Plan
from workflow.plan.resources import Needs
from workflow.plan.storage import root_of
from workflow.working_directory import (
    METADATA,
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
    plan = Plan(load_config(config), ROOT, workflow.overwrite_configfiles)
except UserError as error:
    raise WorkflowError(f"The configuration is refused:\n{error}") from None

needs = Needs(plan)

lend_environment_to_jobs(ROOT)
keep_metadata_with_data()
migrate_records(METADATA)
run_lock = RunLock()


def one_of(names):
    return "|".join(names) or "(?!)"


wildcard_constraints:
    dataset=one_of(plan.config.datasets),
    extractor=one_of(plan.config.extractors),
    experiment=one_of(plan.config.experiments),
    study=one_of(plan.config.studies),
    key="[0-9a-f]{12}",
    run="[0-9a-f]{12}",
    knn_k="[0-9]+",


# `items` is a method of Snakemake's named lists, so the item table goes by `items_` within rules.
def named(paths):
    return {"items_" if name == "items" else name: path for name, path in paths.items()}


# Where jobs run on this machine and it has no GPU, none is asked for: they then run side by side, as cores allow.
def gpus(count):
    def asked(wildcards):
        elsewhere = workflow.non_local_exec_or_dryrun
        return count(wildcards) if elsewhere or gpu_here() else 0

    return asked


# With several GPUs, as many jobs run at a time only if they share the cores as well.
def share_of_cores(count):
    def threads(wildcards):
        available = workflow.global_resources
        cores, held = (
            available[name].value if name in available else None
            for name in ("_cores", "gpu")
        )
        wanted = gpus(count)(wildcards)
        if not (cores and held and wanted):
            return 8
        return max(1, min(8, cores * min(wanted, held) // held))

    return threads


# A params function of wildcards alone is recorded, and a change of what it returns reruns the job; one that takes more
# than wildcards is not. So a rule's `identity` decides, and its `arguments` may hold paths, devices and threads.
def identity(describe):
    return lambda wildcards: describe(wildcards).identity


def arguments(describe):
    def command_line(wildcards, input, output, threads, resources):
        task = describe(wildcards)
        held = {"threads": threads, "gpus": resources.get("gpu", 0)}
        given = [
            ("--spec", canonical_json(task.spec)),
            ("--runtime", canonical_json(task.runtime | held)),
            ("--code", task.version),
        ]
        for option, files in (("--input", input), ("--output", output)):
            given += [
                (option, f"{name.rstrip('_')}={path}") for name, path in files.items()
            ]
        return shlex.join(word for pair in given for word in pair)

    return command_line


onstart:
    run_lock.acquire()


onsuccess:
    print_summary(plan.config.experiments, plan.config.studies, run_lock.since)
