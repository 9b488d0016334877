"""Stage: check the recommendation lists of another tool, and score them on the validation split."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.cli import stage
from cm3.common.files import sha256_of, write_json
from cm3.common.interactions import read_interactions
from cm3.common.strict import validate
from cm3.evaluation.external import read_lists
from cm3.evaluation.external_config import External
from cm3.evaluation.hits import hit_matrix
from cm3.evaluation.ranking import Ranking
from cm3.evaluation.registry import metric_class

log = logging.getLogger("cm3.evaluation.external_stage")


def check_lists(
    *, interactions: Path, items: Path, users: Path, lists: Path, model: Mapping[str, Any], monitor: str, output: Path
) -> dict[str, Any]:
    """Read the lists, warn about unknown ids and short lists, and write what `cm3.evaluation.external.read_external` needs.

    Args:
        interactions, items, users: the tables of the data set.
        lists: the file of the other tool.
        model: settings of `External` without the path.
        monitor: metric at a cut-off, of the record's validation score.
        output: JSON file to write.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: the file cannot be read as lists (`cm3.evaluation.external.read_lists`).
    """
    spec = validate(External, {**model, "recommendations": str(lists)}, "model")
    digest = sha256_of(lists)
    data = read_interactions(interactions, items, users)
    train, test, valid = data.matrix("train"), data.truth("test"), data.truth("valid")
    found = read_lists(spec, data, lists)
    k = int(monitor.partition("@")[2])
    counts = found.counts | found.check_lengths(np.flatnonzero(np.diff(test.indptr)), train, [k], lists)
    tested = np.flatnonzero(np.diff(valid.indptr))
    score = None
    if len(tested):
        hits = hit_matrix(found(Ranking(tested, train), k)[0], valid[tested])
        score = float(metric_class(monitor).values(hits, np.diff(valid.indptr)[tested], k).mean())
        log.info("%s %.4f on the validation split", monitor, score)
    write_json(output, {"model": spec.identity(), "sha256": digest, "file": lists.name, "counts": counts})
    return {
        "monitor": monitor,
        "best_valid": score,
        "selection": {"split": "valid", "value": score},
        "stopped": "lists of another tool",
        "lists": counts,
        "lists_sha256": digest,
        **dict.fromkeys(("epochs", "best_epoch", "best_loss", "seconds_per_epoch", "parameters")),
    }


def main() -> None:
    """Run the stage: spec model, monitor; inputs interactions, items, users, lists; outputs model, record."""
    with stage("cm3.evaluation.external_stage") as call:
        facts = check_lists(
            **{name: call.inputs[name] for name in ("interactions", "items", "users", "lists")},
            model=call.spec["model"],
            monitor=call.spec["monitor"],
            output=call.outputs["model"],
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
