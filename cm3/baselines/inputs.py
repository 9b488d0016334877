"""What a baseline is made from: interactions, features and neighbours, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from cm3.baselines.config import BaselineSettings
from cm3.common.errors import UserError
from cm3.common.interactions import Interactions
from cm3.common.tables import read_features
from cm3.config import modality_weights
from cm3.model.model import fill_missing
from cm3.training.run import read_neighbours

Neighbours = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """The training data of a model.

    Attributes:
        interactions: (U, I), 1 for each distinct training pair.
        features: (I, d_m) float32 by modality; rows without a vector are filled as the settings say, or zero.
        neighbours: item, neighbour and cosine by modality, for models that read similarity files.
        weights: of the modalities, summing to 1, for models that weigh them.
    """

    interactions: sp.csr_matrix
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    neighbours: Mapping[str, Neighbours] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


def read_inputs(
    data: Interactions,
    settings: BaselineSettings,
    modalities: Sequence[str],
    features: Mapping[str, Path],
    similarity: Mapping[str, Path],
) -> Inputs:
    """Read the files that the model asks for.

    Raises:
        UserError: modalities where the model takes none or none where it needs some, weights of other modalities, or
            files that do not fit.
    """
    check_modalities(settings, modalities)
    chosen: Any = settings
    filled = {}
    for m in modalities:
        read = read_features(features[m], data.item_ids)
        filled[m] = fill_missing(read.embedding, read.ok, getattr(settings, "missing", "zero"), str(features[m]))
    neighbours = {}
    if settings.graphs:
        neighbours = {m: read_neighbours(similarity[m], chosen.knn_k, len(data.item_ids)) for m in modalities}
    weighs = "modality_weights" in type(settings).model_fields
    weights = modality_weights(chosen, modalities) if weighs else {}
    return Inputs(data.matrix("train"), filled, neighbours, weights)


def check_modalities(settings: BaselineSettings, modalities: Sequence[str], where: str = "") -> None:
    """Refuse modalities where the model takes none, and none where it needs some; `where` stands before the complaint.

    Raises:
        UserError: one of the two.
    """
    if settings.modalities == "required" and not modalities:
        raise UserError(f"{where}model {settings.name!r} reads items' features: name an extractor for a modality")
    if settings.modalities == "none" and modalities:
        raise UserError(
            f"{where}model {settings.name!r} reads interactions alone: remove the modalities {', '.join(modalities)}"
        )
