"""Stage: label interactions as train, valid or test. The function `sources.split` is in cm3.datasets.splits."""

from cm3.common.cli import stage
from cm3.datasets.splits import split_ratings


def main() -> None:
    """Spec: strategy, seed, keep. Inputs: ratings; to keep labels `items`, `users`, and `keep.interactions`,
    `keep.items`, `keep.users`. Outputs: interactions, record."""
    with stage("cm3.datasets.label") as call:
        strategy, seed = call.spec["strategy"], call.spec["seed"]
        tables = call.inputs if call.spec.get("keep") else None
        facts = split_ratings(call.inputs["ratings"], call.outputs["interactions"], strategy, seed, tables)
        call.record.update(facts)


if __name__ == "__main__":
    main()
