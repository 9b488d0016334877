"""Names of an experiment's modalities: the kind of the extractor, or names of the user's own."""

from collections.abc import Mapping
from dataclasses import replace

from cm3.model_spec import Weighted
from extractors.spec import NAME, BackendSpec
from workflow.plan.experiments import Experiment

IMAGE = "image"
_RESERVED = "fused"  # the stream of the model that fuses the modalities


def name_faults(path: str, name: str, extractor: str, extractors: Mapping[str, BackendSpec]) -> list[str]:
    """Return what is wrong with the name of a modality that `extractor` makes the vectors of.

    A name of the user's own is allowed, so that several extractors of one kind can be used together. The name of a kind
    is not, for an extractor of another kind.
    """
    kind = extractors[extractor].modality
    if name == kind:
        return []
    if not NAME.fullmatch(name) or name == _RESERVED:
        return [f"{path}: not a name of a modality; use letters, digits, '.', '_' and '-', and not {_RESERVED!r}"]
    fitting = sorted(other for other, spec in extractors.items() if spec.modality == name)
    if not fitting and name not in ("text", IMAGE, "caption", "multimodal", "reviews"):
        return []
    return [
        f"{path} = {extractor!r}: this extractor is of modality {kind!r}; of modality {name!r} there are: "
        f"{', '.join(fitting) or 'none'}; or give the modality a name of your own"
    ]


def with_weights_by_kind(experiment: Experiment, extractors: Mapping[str, BackendSpec]) -> Experiment:
    """Return the experiment with the default weights of modalities that have names of the user's own.

    A model weighs a modality named image less than others. Under other names it cannot know which read images: all
    modalities of this kind together then get the weight of image, and the others share the rest. An experiment whose
    modalities are named by their kind is returned unchanged, and keeps its keys.
    """
    model = experiment.model
    kinds = {name: extractors[extractor].modality for name, extractor in experiment.modalities.items()}
    if not isinstance(model, Weighted) or model.modality_weights is not None or all(n == k for n, k in kinds.items()):
        return experiment
    images = [name for name, kind in kinds.items() if kind == IMAGE]
    others = len(kinds) - len(images)
    if images and others:
        share = dict.fromkeys(kinds, (1 - model.image_share) / others)
        share |= dict.fromkeys(images, model.image_share / len(images))
    else:
        share = dict.fromkeys(kinds, 1 / len(kinds))
    return replace(experiment, model=model.model_copy(update={"modality_weights": share}))
