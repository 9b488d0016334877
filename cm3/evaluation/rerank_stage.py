"""Stage: choose the weights of a re-ranking on the validation split."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3.common.cli import stage
from cm3.common.device import set_threads
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.interactions import read_interactions
from cm3.evaluation.rerank import fit_weights, scores_by_model

log = logging.getLogger("cm3.evaluation.rerank_stage")


def rerank(
    *,
    interactions: Path,
    items: Path,
    users: Path,
    files: Mapping[str, Path],
    of: str,
    scores: Mapping[str, str],
    top: int,
    weights: Mapping[str, float],
    grid: Sequence[float],
    monitor: str,
    output: Path,
) -> dict[str, Any]:
    """Choose weights and write them with what `cm3.evaluation.rerank.read_reranker` needs.

    Args:
        interactions, items, users: the tables of the data set.
        files: of the models, as `cm3.evaluation.rerank.scores_by_model` reads them.
        of: the base model.
        scores: dot or cosine of each model, the base model included.
        top, weights, grid: as in `cm3.evaluation.rerank_config.Rerank`.
        monitor: metric at a cut-off.
        output: JSON file to write.

    Returns:
        Facts for the stage's record.

    Raises:
        UserError: no user has validation items, a cut-off beyond `top`, or files that do not fit the data.
    """
    k = int(monitor.partition("@")[2])
    if k > top:
        raise UserError(f"model.top = {top}: training.monitor is {monitor}; re-rank at least {k} items")
    data = read_interactions(interactions, items, users)
    train, truth = data.matrix("train"), data.truth("valid")
    if not truth.nnz:
        raise UserError(f"{interactions}: no row is in the valid split, which training.monitor needs; check the split")
    by_name = scores_by_model(files, scores, data, "cpu")
    parts = {name: score for name, score in by_name.items() if name != of}
    chosen, tried, plain = fit_weights(
        by_name[of], parts, train, truth, top=top, monitor=monitor, grid=grid, given=weights
    )
    best = next(row[monitor] for row in tried if row["weights"] == chosen)
    write_json(output, {"of": of, "top": top, "weights": chosen, "scores": dict(scores), "monitor": monitor})
    log.info("%s %.4f with weights %s, %.4f without them", monitor, best, chosen, plain)
    return {
        "monitor": monitor,
        "best_valid": best,
        "selection": {"split": "valid", "value": best},
        "stopped": f"best of {len(tried)} combinations of weights",
        "weights": chosen,
        "valid_without": plain,
        "tried": tried,
        **dict.fromkeys(("epochs", "best_epoch", "best_loss", "seconds_per_epoch", "parameters")),
    }


def main() -> None:
    """Run the stage: spec of, scores, top, weights, grid, monitor; inputs interactions, items, users and the files of the
    models; outputs model and record.
    """
    with stage("cm3.evaluation.rerank_stage") as call:
        set_threads(call.runtime.get("threads"))
        tables = ("interactions", "items", "users")
        facts = rerank(
            interactions=call.inputs["interactions"],
            items=call.inputs["items"],
            users=call.inputs["users"],
            files={name: path for name, path in call.inputs.items() if name not in tables},
            **call.spec,
            output=call.outputs["model"],
        )
        call.record.update(facts)


if __name__ == "__main__":
    main()
