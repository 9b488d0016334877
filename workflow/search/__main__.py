"""Searches the settings of a study by validation: ./run search STUDY [--configfile FILE ...] [SNAKEMAKE OPTIONS]."""

import argparse
import logging
import sys
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.files import exclusive
from workflow.plan.config import load_config
from workflow.plan.publish import command
from workflow.plan.searches import ExperimentState, state_path
from workflow.prune import read_config
from workflow.search.driver import search


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="./run search", description=__doc__.split(":")[0] + ". Further options go to snakemake, such as --cores 8."
    )
    parser.add_argument("study", metavar="STUDY", help="a study of the configuration that has a search")
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], metavar="FILE", help="as for snakemake")
    arguments, options = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if not any(option.startswith(("--cores", "-c", "--jobs", "-j")) for option in options):
        options += ["--cores", "all"]
    if arguments.configfile:
        options += ["--configfile", *map(str, arguments.configfile)]
    try:
        config = load_config(read_config(arguments.configfile), arguments.configfile)
        with exclusive(state_path(arguments.study).parent / "search/.lock"):
            states = search(config, arguments.study, options)
    except UserError as error:
        sys.exit(f"ERROR: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    print("\n".join(summary(name, state) for name, state in states.items()))
    print(f"Compare the best: {command(config, f'results/{arguments.study}/comparison.html')}")


def summary(name: str, state: ExperimentState) -> str:
    """Return a line on the trials of an experiment and the best of them."""
    counts = {kind: sum(trial.state == kind for trial in state.trials) for kind in ("complete", "pruned", "failed")}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    best = state.best(1)
    if not best:
        return f"{name}: {found or 'no trials'}; none complete"
    values = ", ".join(f"{path} = {value}" for path, value in best[0].values.items())
    return f"{name}: {found}; best validation {state.monitor} {best[0].score:.4f} in trial {best[0].number}: {values}"


if __name__ == "__main__":
    main()
