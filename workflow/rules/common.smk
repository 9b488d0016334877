import inspect
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(str(workflow.current_basedir)).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cm3.common.errors import UserError, path_fault
from cm3.common.files import write_json
from cm3.common.gpus import gpu_here
from cm3.common.keys import canonical_json
from cm3.common.ledger import Ledger
from workflow.plan import comparison, data, features, mmrec, pages, publish, runs
from workflow.plan.config import load_config
from workflow.plan.migrate import migrate_records
from workflow.plan.resources import Needs
from workflow.plan.storage import root_of
from workflow.records import check_outputs
from workflow.snakemake_internals import (
    METADATA,
    compare_inputs_by_content,
    config_files,
    extend_targets,
    has_local_files,
    is_main_process,
    literal_path,
    resource_limit,
    runs_elsewhere,
    store_metadata_with_data,
)
from workflow.summary import print_summary
from workflow.working_directory import RunLock, set_job_environment


configfile:
    "config/config.yaml"
    if Path("config/config.yaml").exists()
    else str(ROOT / "config/config.yaml")


try:
    settings = load_config(config, config_files(workflow), has_local_files(workflow))
except UserError as error:
    raise WorkflowError(f"The configuration is refused:\n{error}") from None

needs = Needs(settings)

set_job_environment(ROOT)
ledger = Ledger()
compare_inputs_by_content(ledger)
run_lock = RunLock()

try:
    store_metadata_with_data()
    migrate_records(METADATA)
    warnings = check_outputs(ledger) if is_main_process(workflow) else []
except OSError as error:
    raise WorkflowError(str(path_fault(error) or error)) from None
for warning in warnings:
    print(f"WARNING: {warning}", file=sys.stderr)

if is_main_process(workflow) and has_local_files(workflow):
    extend_targets(workflow, lambda targets: pages.existing_pages(settings, targets))


def one_of(names):
    return "|".join(names) or "(?!)"


wildcard_constraints:
    dataset=one_of(settings.datasets),
    extractor=one_of(settings.extractors),
    experiment=one_of(settings.experiments),
    study=one_of(settings.studies),
    key="[0-9a-f]{12}",
    run="[0-9a-f]{12}",
    knn_k="[0-9]+",


# A function of workflow/plan for a rule: called with the configuration and the wildcards that its parameters name.
def planned(function):
    _, *names = inspect.signature(function).parameters
    return lambda wildcards: function(
        settings, *(getattr(wildcards, name) for name in names)
    )


# Input files by name. `items` is a method of Snakemake's named lists, so within rules the item table is `items_`.
def files(function):
    return lambda wildcards: {
        "items_" if name == "items" else name: literal_path(path)
        for name, path in planned(function)(wildcards).items()
    }


# A change of the identity reruns the job. Snakemake records the parameters whose functions take wildcards alone.
def identity(function):
    return lambda wildcards: planned(function)(wildcards).identity


# The command line of a stage. Not recorded, because its function takes more than wildcards, so it can hold paths,
# devices and threads.
def arguments(function):
    def command_line(wildcards, input, output, threads, resources):
        task = planned(function)(wildcards)
        allotted = {"threads": threads, "gpus": resources.get("gpu", 0)}
        options = [
            ("--spec", canonical_json(task.spec)),
            ("--runtime", canonical_json(task.runtime | allotted)),
            ("--code", task.version),
            ("--identity", task.identity),
            *(("--library", name) for name in task.libraries),
        ]
        inputs = {name.rstrip("_"): str(path) for name, path in input.items()}
        expected = data.expected_settings(settings, inputs)
        if expected:
            options.append(("--expected", canonical_json(expected)))
        if task.stage in data.STAGES:
            options.append(("--made-from", canonical_json(task.made_from)))
        for option, paths in (("--input", input), ("--output", output)):
            options += [
                (option, f"{name.rstrip('_')}={path}") for name, path in paths.items()
            ]
        return shlex.join(word for option in options for word in option)

    return command_line


# GPUs of a job. None if jobs run on this machine and it has no GPU: they then run in parallel, as cores allow.
def gpus(function):
    def count(wildcards):
        available = runs_elsewhere(workflow) or gpu_here()
        return planned(function)(wildcards) if available else 0

    return count


# Threads of a job that can have a GPU: its share of the cores, so that as many jobs run at a time as there are GPUs.
def share_of_cores(function):
    def threads(wildcards):
        cores = resource_limit(workflow, "_cores")
        all_gpus = resource_limit(workflow, "gpu")
        own_gpus = gpus(function)(wildcards)
        if not (cores and all_gpus and own_gpus):
            return 8
        return max(1, min(8, cores * min(own_gpus, all_gpus) // all_gpus))

    return threads


onstart:
    try:
        run_lock.acquire()
    except OSError as error:
        raise WorkflowError(str(path_fault(error) or error)) from None


onsuccess:
    print_summary(settings.experiments, settings.studies, run_lock.since)
