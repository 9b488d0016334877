"""Reductions of an experiment's features: those of its extractors, or its own in their place."""

from collections.abc import Mapping
from dataclasses import replace

from cm3.common.errors import UserError
from cm3.common.reduction import Reduction
from cm3.common.strict import nearest
from extractors.spec import BackendSpec
from workflow.plan.experiments import Experiment


def with_reductions(
    experiment: Experiment,
    own: Mapping[str, Reduction | None],
    extractors: Mapping[str, BackendSpec],
    where: str,
) -> Experiment:
    """Return the experiment with the reduction of each modality: its own, or that of the modality's extractor.

    Args:
        experiment: the experiment without reductions.
        own: the `reduce` of its section; None for a modality leaves its features as they are.
        extractors: all extractors by name.
        where: path of its section.

    Raises:
        UserError: a reduction of a modality that the experiment does not have.
    """
    unknown = next((modality for modality in own if modality not in experiment.modalities), None)
    if unknown is not None:
        raise UserError(
            f"{where}.reduce.{unknown}: the experiment has no such modality{nearest(unknown, experiment.modalities)}"
        )
    chosen = {modality: extractors[extractor].reduce for modality, extractor in experiment.modalities.items()}
    chosen |= own
    return replace(experiment, reductions={modality: one for modality, one in chosen.items() if one is not None})
