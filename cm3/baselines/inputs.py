"""Inputs of a baseline: interactions, features and neighbours, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cm3.baselines.base import Baseline, FilledFeatures
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.interactions import Interactions
from cm3.model.model import fill_missing
from cm3.model_spec import ItemGraphs, Weighted, modality_weights
from cm3.training.run import read_neighbours

Neighbours = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """The training data of a model.

    Attributes:
        interactions: (U, I), 1 for each distinct training pair.
        features: (I, d_m) float32 by modality; rows without a vector are filled as the settings say, or with zeros.
        neighbours: item, neighbour and cosine by modality, for models that read item graphs.
        weights: of the modalities, summing to 1, for models that weigh them.
    """

    interactions: sp.csr_matrix
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    neighbours: Mapping[str, Neighbours] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def read_inputs(
    data: Interactions,
    model: Baseline,
    modalities: Sequence[str],
    features: Mapping[str, Path],
    similarity: Mapping[str, Path],
) -> Inputs:
    """Read the files of features and item graphs that the model uses.

    Raises:
        UserError: modalities that the model does not accept or lacks, weights of other modalities, or files that do not
            fit together.
    """
    check_modalities(model, modalities)
    missing = model.missing if isinstance(model, FilledFeatures) else "zero"
    filled = {}
    for m in modalities:
        read = read_features(features[m], data.item_ids)
        filled[m] = fill_missing(read.embedding, read.ok, missing, str(features[m]))
    neighbours = {}
    if isinstance(model, ItemGraphs):
        neighbours = {m: read_neighbours(similarity[m], model.knn_k, len(data.item_ids)) for m in modalities}
    weights = modality_weights(model, modalities) if isinstance(model, Weighted) else {}
    return Inputs(data.matrix("train"), filled, neighbours, weights)


def check_modalities(model: Baseline, modalities: Sequence[str], where: str = "") -> None:
    """Check that a model that reads features has a modality, and that another has none; `where` begins the message.

    Raises:
        UserError: it has none, or has one that it does not read.
    """
    if model.reads_features and not modalities:
        raise UserError(f"{where}model {model.name!r} reads items' features: name an extractor for a modality")
    if modalities and not model.reads_features:
        raise UserError(
            f"{where}model {model.name!r} reads interactions only: remove the modalities {', '.join(modalities)}"
        )
