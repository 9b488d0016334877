"""Stage: label interactions as train, valid or test. The function `cm3.datasets.split` is in cm3.datasets.splits."""

import logging

from cm3.common.cli import stage
from cm3.datasets.splits import split_ratings


def main() -> None:
    """Spec: strategy, seed, keep. Runtime: warn_of_random. Outputs: interactions, record.

    Inputs: ratings; with `keep` also items, users, keep.interactions, keep.items and keep.users.
    """
    with stage("cm3.datasets.label") as call:
        strategy, seed = call.spec["strategy"], call.spec["seed"]
        tables = call.inputs if call.spec.get("keep") else None
        ratings, interactions = call.inputs["ratings"], call.outputs["interactions"]
        level = logging.WARNING if call.runtime.get("warn_of_random") else logging.INFO
        facts = split_ratings(ratings, interactions, strategy, seed, tables, call.made_from, level)
        call.record.update(facts)


if __name__ == "__main__":
    main()
