import functools
import inspect
import json
import math
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import MissingRuleException, WorkflowError

ROOT = Path(str(workflow.current_basedir)).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cm3.common.errors import UserError, path_fault
from cm3.common.files import write_json
from cm3.common.gpus import gpu_here
from cm3.common.keys import canonical_json
from cm3.common.ledger import Ledger
from cm3.datasets.download.sizes import published_sizes
from workflow.plan import comparison, data, features, mmrec, pages, publish, runs
from workflow.plan.config import load_config
from workflow.plan.forecast import PlannedJob, forecast
from workflow.plan.migrate import migrate_records
from workflow.plan.resources import Needs
from workflow.plan.storage import root_of
from workflow.records import check_outputs
from workflow.snakemake_internals import (
    METADATA,
    compare_inputs_by_content,
    config_files,
    extend_targets,
    config_overrides,
    executes_jobs,
    has_cluster,
    has_local_files,
    is_main_process,
    keep_entries_of_touched_files,
    literal_path,
    log_file,
    planned_jobs,
    replace_terminal_output,
    resource_limit,
    runs_elsewhere,
    shows_commands,
    store_metadata_with_data,
    targets,
)
from workflow.summary import print_summary
from workflow.targets import names_in, unknown_target
from workflow.terminal import Terminal, quoted, user_error
from workflow.working_directory import (
    RunLock,
    log_to_files_only,
    set_job_environment,
)

# Environment variable with the decisions of `runs.trained_in`.
TRAINED_IN = "CM3_TRAINED_IN"

# Messages of the functions of workflow/plan; Snakemake adds its rule, wildcards and traceback to them.
planning_errors = []


# In place of Snakemake's message about an error; None keeps it.
def explained(error):
    if isinstance(error, MissingRuleException):
        return unknown_target(settings, targets(workflow))
    return quoted(planning_errors, str(error)) or user_error(error)


def summarise_requested():
    print_summary(settings, names_in(settings, targets(workflow)))


# What the planned jobs download, and how long their extractors take here; a cluster's machines are unknown.
@functools.cache
def cost_of_run():
    jobs = [PlannedJob(*job) for job in planned_jobs(workflow)]
    on_gpus = has_cluster(workflow) or gpu_here()
    return forecast(settings, jobs, on_gpus, published_sizes)


terminal = replace_terminal_output(
    workflow,
    lambda original: Terminal(
        original,
        executes=lambda: executes_jobs(workflow),
        explain=explained,
        nothing_to_do=summarise_requested,
        forecast=lambda: cost_of_run().described(refusals=not executes_jobs(workflow)),
        shows_commands=shows_commands(workflow),
    ),
)


configfile:
    "config/config.yaml"
    if Path("config/config.yaml").exists()
    else str(ROOT / "config/config.yaml")


try:
    settings = load_config(
        config,
        config_files(workflow),
        has_local_files(workflow),
        config_overrides(workflow),
    )
except UserError as error:
    raise WorkflowError(f"The configuration is refused:\n{error}") from None

needs = Needs(settings)
if not is_main_process(workflow):
    settings.decisions.update(json.loads(os.environ.get(TRAINED_IN, "{}")))

set_job_environment(ROOT)
if terminal:
    log_to_files_only()
ledger = Ledger()
compare_inputs_by_content(ledger)
keep_entries_of_touched_files(ledger)
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

    def call(wildcards):
        try:
            return function(settings, *(getattr(wildcards, name) for name in names))
        except UserError as error:
            planning_errors.append(str(error))
            raise

    return call


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
        share = resources.get("gpu_percent", 0)
        allotted = {
            "threads": threads,
            "gpus": resources.get("gpu", 0) or (share / 100 if share else 0),
            "mem_mb": resources.get("mem_mb"),
        }
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


# GPUs of a job, below 1 for a share. None if jobs run on this machine and it has no GPU: they then run in parallel, as
# cores allow.
def wanted_gpus(function):
    def count(wildcards):
        available = runs_elsewhere(workflow) or gpu_here()
        return planned(function)(wildcards) if available else 0

    return count


# Whole GPUs of a job. A share of one counts in `gpu_percent` on this machine; a cluster gives the job a GPU of its own.
def gpus(function):
    def count(wildcards):
        wanted = wanted_gpus(function)(wildcards)
        return math.ceil(wanted) if runs_elsewhere(workflow) else int(wanted)

    return count


def gpu_percent(function):
    return lambda wildcards: int(100 * wanted_gpus(function)(wildcards))


# The same for an evaluation, whose share depends on the sizes of its inputs. None on a cluster, where a GPU takes longer to
# get than to use.
def gpu_percent_of_evaluation(wildcards, input):
    if runs_elsewhere(workflow) or not gpu_here():
        return 0
    files = {name.rstrip("_"): str(path) for name, path in input.items()}
    return needs.evaluation_gpu_percent(wildcards, files)


# Threads of a job that can have a GPU: its share of the cores, so that as many jobs run at a time as there are GPUs.
def share_of_cores(function):
    def threads(wildcards):
        cores = resource_limit(workflow, "_cores")
        all_gpus = resource_limit(workflow, "gpu")
        own_gpus = wanted_gpus(function)(wildcards)
        if not (cores and all_gpus and own_gpus):
            return 8
        return max(1, min(8, int(cores * min(own_gpus, all_gpus) / all_gpus)))

    return threads


# The same for a search of neighbours, but one thread for a small one on CPUs, so that several run at a time.
def threads_of_search(wildcards, input):
    files = {name.rstrip("_"): str(path) for name, path in input.items()}
    gpus = wanted_gpus(features.similarity_gpus)(wildcards)
    if not gpus and needs.is_small_search(wildcards, files):
        return 1
    return share_of_cores(features.similarity_gpus)(wildcards)


onstart:
    try:
        run_lock.acquire()
    except OSError as error:
        raise WorkflowError(str(path_fault(error) or error)) from None
    # for the processes of jobs that read this file again
    os.environ[TRAINED_IN] = canonical_json(settings.decisions)
    if cost_of_run().refused:
        raise WorkflowError("\n".join(cost_of_run().refused))


onsuccess:
    if terminal:
        terminal.end()
    print_summary(
        settings,
        [*settings.experiments, *settings.studies],
        run_lock.since,
        warnings=terminal.warnings() if terminal else [],
        log=log_file(workflow) if terminal else None,
    )


onerror:
    if terminal:
        terminal.report_failures()
