"""Repeated splits of a study: which seeds they have, and which experiments cannot be compared over several splits."""

from collections.abc import Iterator, Mapping, Sequence

from cm3.common.errors import UserError
from cm3.datasets.spec import SourceSpec
from cm3.evaluation.external_config import External
from cm3.evaluation.rerank_config import Rerank
from extractors.spec import BackendSpec
from workflow.plan.experiments import Experiment

FIXED = {
    "published": "its labels are in the data",
    "user-time": "it follows from the times of the interactions",
    "global-time": "it follows from the times of the interactions",
    "leave-one-out": "it follows from the times of the interactions",
}
"""Why a strategy has one split only."""


def split_seeds(
    repeats: int,
    compared: Mapping[str, Experiment],
    experiments: Mapping[str, Experiment],
    datasets: Mapping[str, SourceSpec],
    extractors: Mapping[str, BackendSpec],
    where: str,
) -> Sequence[int | None]:
    """Return the seeds of the splits of a study: None for the dataset's own split, then the seeds after the dataset's.

    Args:
        repeats: number of splits.
        compared: the experiments of the study, all of one dataset.
        experiments: all experiments, among them those that a re-ranking combines.
        datasets, extractors: by name.
        where: the key path of the study.

    Raises:
        UserError: several splits of a dataset whose split is not random, or of an experiment that depends on one split.
    """
    if repeats == 1:
        return (None,)
    path = f"{where}.split.repeats = {repeats}"
    name = next(iter(compared.values())).dataset
    split = datasets[name].split_spec()
    faults = []
    if split["strategy"] in FIXED:
        faults.append(
            f"{path}: dataset {name} has split.strategy {split['strategy']}, of which there is one split only, because "
            f"{FIXED[split['strategy']]}; remove split.repeats, or set the dataset's split.strategy to random"
        )
    elif split.get("keep"):
        faults.append(f"{path}: dataset {name} has split.keep, so its splits would share the labels that are kept")
    for experiment, settings in compared.items():
        for of, used in _with_combined(experiment, settings, experiments):
            faults += [f"{path}: {of} {reason}" for reason in _reasons(used, extractors)]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return (None, *range(split["seed"] + 1, split["seed"] + repeats))


def _with_combined(
    name: str, settings: Experiment, experiments: Mapping[str, Experiment]
) -> Iterator[tuple[str, Experiment]]:
    yield name, settings
    if isinstance(settings.model, Rerank):
        yield from ((other, experiments[other]) for other in (settings.model.of, *settings.model.by))


def _reasons(experiment: Experiment, extractors: Mapping[str, BackendSpec]) -> Iterator[str]:
    """Yield why an experiment can be evaluated on one split only."""
    if isinstance(experiment.model, External):
        yield "has lists that another tool has computed on one split"
    if experiment.training.warm_start:
        yield "starts from a model (training.warm_start) that has learnt from the training interactions of one split"
    for extractor in experiment.modalities.values():
        if "reviews" in extractors[extractor].needs():
            yield (
                f"reads features of reviews ({extractor}), which are those in the training interactions of one split: in "
                "another split some of them are test interactions"
            )
