"""List of experiments and studies, and which of them have results of their present settings.

python -m workflow.overview [--configfile FILE ...] [--config WORDS ...]
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.ledger import Ledger
from workflow.plan.comparison import compare
from workflow.plan.config import Config, load_config
from workflow.plan.publish import publish, run_command
from workflow.plan.task import Task
from workflow.prune import read_config

DONE, CHANGED, NOTHING, UNKNOWN = "done", "other settings", "-", "?"
STATES = {
    DONE: "results of these settings are there",
    CHANGED: "the results are of other settings or an earlier version",
    NOTHING: "not run",
    UNKNOWN: "cannot be determined here",
}


def overview(config: Config) -> str:
    """Return a table of all experiments and one of all studies, with the state of each.

    The state compares the settings and versions that the results were made with; whether input files have changed, a dry
    run says: `snakemake -n`.
    """
    ledger = Ledger()
    lines = [("experiment", "dataset", "model", "features", "results")]
    for name, experiment in config.experiments.items():
        features = ", ".join(f"{modality} {name}" for modality, name in experiment.feature_names().items())
        done = state(ledger, f"results/{name}/metrics.json", partial(publish, config, name))
        lines.append((name, experiment.dataset, experiment.model_name, features or "-", done))
    studies = [("study", "experiments", "results")]
    for name, study in config.studies.items():
        done = state(ledger, f"results/{name}/comparison.json", partial(compare, config, name))
        studies.append((name, str(len(study.points)), done))
    used = {row[-1] for row in (*lines, *studies)}
    parts = ["\n".join(_table(lines))]
    if config.studies:
        parts.append("\n".join(_table(studies)))
    parts.append("\n".join(f"{word}: {meaning}" for word, meaning in STATES.items() if word in used))
    parts.append(f"Run one: {run_command(config, 'NAME')} or {run_command(config, 'study', 'NAME')}")
    return "\n\n".join(parts)


def state(ledger: Ledger, path: str, task: Callable[[], Task]) -> str:
    """Return a word of `STATES` for a result: whether it was made with the settings and versions of its task."""
    if not Path(path).exists():
        return NOTHING
    entry = ledger.entry(path)
    try:
        identity = task().identity
    except UserError:
        return UNKNOWN
    if entry is None or not entry.identity:
        return UNKNOWN
    return DONE if entry.identity == identity else CHANGED


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="./run list", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], action="extend", metavar="FILE", help="as for snakemake"
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="WORDS", help="as for snakemake")
    arguments = parser.parse_args()
    try:
        config = load_config(read_config(arguments.configfile), arguments.configfile, overrides=arguments.config)
        print(overview(config))
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
