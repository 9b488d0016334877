"""How much each modality's item-item graph counts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.strict import nearest

if TYPE_CHECKING:
    from cm3.config import Model


def modality_weights(model: "Model", modalities: Sequence[str], where: str = "model") -> dict[str, float]:
    """Return the weight of each modality's item-item graph, in the modalities' order, scaled to sum 1.

    Raises:
        UserError: the weights name a modality that the experiment lacks, or lack one that it has.
    """
    given = model.modality_weights
    if given is None:
        image = "image" in modalities and len(modalities) > 1
        rest = (0.9 if image else 1.0) / (len(modalities) - image)
        return {m: 0.1 if image and m == "image" else rest for m in modalities}
    path = f"{where}.modality_weights"
    for name in given:
        if name not in modalities:
            raise UserError(f"{path}.{name}: the experiment has no such modality{nearest(name, modalities)}")
    for name in modalities:
        if name not in given:
            raise UserError(f"{path}: modality {name!r} has no weight; give it one (0 leaves its graph out)")
    total = sum(given.values())
    return {m: given[m] / total for m in modalities}
