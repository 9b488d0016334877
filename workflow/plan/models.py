"""The models by name: which settings they take, what they read and leave behind, and which modules fit them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cm3.baselines.config import MODELS, BaselineSettings, baseline_settings
from cm3.common.errors import UserError
from cm3.common.strict import Strict, nearest, validate
from cm3.config import PRESETS, Model

CM3 = "cm3"
NAMES = (CM3, *MODELS)

ModelSettings = Model | BaselineSettings


@dataclass(frozen=True)
class Traits:
    """What the plan must know of a model.

    Attributes:
        stage: the module of its training stage.
        modules: modules that the stage loads by name.
        content: whether it reads features; one that does needs a modality, one that does not takes none.
        graphs: whether it reads the item graphs of its features.
        trains: whether `training` applies, or it is computed in closed form.
        on_device: whether it computes on a GPU where there is one.
        embeddings: whether it leaves embeddings of users and items behind, or item weights.
    """

    stage: str
    modules: tuple[str, ...]
    content: bool
    graphs: bool
    trains: bool
    on_device: bool
    embeddings: bool


def name_of(model: ModelSettings) -> str:
    """Return the name that the config gives a model."""
    return model.name if isinstance(model, BaselineSettings) else CM3


def traits(name: str) -> Traits:
    """Return the traits of a model of `NAMES`."""
    if name == CM3:
        return Traits("cm3.training.train", (), content=True, graphs=True, trains=True, on_device=True, embeddings=True)
    chosen = MODELS[name]
    return Traits(
        "cm3.baselines.train",
        (chosen.module,),
        content=chosen.modalities == "required",
        graphs=chosen.graphs,
        trains=chosen.trains,
        on_device=chosen.on_device,
        embeddings=chosen.exports == "embeddings",
    )


def settings_class(name: str) -> type[Strict]:
    """Return the settings of a model of `NAMES`."""
    return Model if name == CM3 else MODELS[name]


def parse_model(data: Mapping[str, Any], preset: str, where: str) -> ModelSettings:
    """Return an experiment's section `model`; without `name`, it is CM3's, laid over the preset.

    Args:
        data: the section.
        preset: a name of `cm3.config.PRESETS`; those but the default are CM3's.
        where: the key path of the section.

    Raises:
        UserError: an unknown model, key or value.
    """
    name = data.get("name", CM3)
    if name not in NAMES:
        raise UserError(f"{where}.name = {name!r}: there is no such model{nearest(str(name), NAMES)}")
    if name == CM3:
        own = {key: value for key, value in data.items() if key != "name"}
        return validate(Model, {**PRESETS[preset]["model"], **own}, where)
    return baseline_settings(data, where)
