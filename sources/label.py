"""Stage: label interactions as train, valid or test. The function `sources.split` is in sources.splits."""

from sources.splits import split_ratings
from stages.command import stage


def main() -> None:
    """Spec: strategy, seed. Input: ratings. Output: interactions, record."""
    with stage("sources.label") as call:
        facts = split_ratings(
            call.inputs["ratings"], call.outputs["interactions"], call.spec["strategy"], call.spec["seed"]
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
