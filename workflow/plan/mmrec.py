"""Export to MMRec: the inputs and tasks of writing an experiment's tables and vectors in the layout of that toolbox."""

from cm3.common.errors import UserError
from workflow.plan.config import Config
from workflow.plan.runs import features_of, tables
from workflow.plan.task import Task


def export_inputs(config: Config, experiment: str) -> dict[str, str]:
    """Return the tables that the export reads, and the exported vectors that belong to it."""
    folder = f"results/{experiment}/mmrec/{experiment}"
    modalities = config.experiments[experiment].modalities
    return tables(config, experiment) | {f"vectors.{m}": f"{folder}/{m}_feat.npy" for m in modalities}


def export(config: Config, experiment: str) -> Task:
    """Return the task of writing interactions, ids and settings."""
    spec = {"experiment": experiment, "modalities": list(config.experiments[experiment].modalities)}
    return Task("mmrec", spec)


def vectors_inputs(config: Config, experiment: str, modality: str) -> dict[str, str]:
    """Return the features of a modality, and the interactions, which determine the numbers of the items.

    Raises:
        UserError: the experiment has no such modality.
    """
    chosen = config.experiments[experiment]
    if modality not in chosen.modalities:
        raise UserError(f"experiments.{experiment} has no modality {modality!r}; it has {', '.join(chosen.modalities)}")
    return {
        "features": features_of(config, chosen)[modality],
        "interactions": f"processed/{chosen.dataset}/interactions.parquet",
    }


def vectors(config: Config) -> Task:
    """Return the task of writing the vectors of one modality."""
    return Task("mmrec-vectors", {})
