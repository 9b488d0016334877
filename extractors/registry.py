"""Registry of backends: name -> "module:Class" of its spec. Adding a backend adds one line.

Backends of other packages are entry points of the group `cm3.extractors`.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from cm3.common.entry_points import with_entry_points
from cm3.common.errors import UserError
from cm3.common.strict import nearest, validate
from extractors.spec import NAME, BackendSpec

BACKENDS = {
    "sentence-transformers": "extractors.text.sentence_transformers:SentenceTransformersSpec",
    "transformers-text": "extractors.text.transformers:TransformersTextSpec",
    "timm": "extractors.image.timm:TimmSpec",
    "open_clip": "extractors.image.open_clip:OpenClipSpec",
    "transformers-vision": "extractors.image.transformers:TransformersVisionSpec",
    "tfidf": "extractors.text.tfidf:TfidfSpec",
    "descriptor": "extractors.image.descriptor:DescriptorSpec",
    "transformers-mllm": "extractors.multimodal.transformers:TransformersMllmSpec",
    "transformers-caption": "extractors.caption.transformers:TransformersCaptionSpec",
    "vllm-caption": "extractors.caption.vllm:VllmCaptionSpec",
    "openai-caption": "extractors.caption.openai:ServerCaptionSpec",
    "precomputed": "extractors.precomputed.reader:PrecomputedSpec",
}


def backends() -> dict[str, str]:
    """Return `BACKENDS` with the backends of other packages, name -> "module:Class"."""
    return with_entry_points("cm3.extractors", BACKENDS)


def spec_class(backend: str) -> type[BackendSpec]:
    """Return the spec class of a backend. Imports no model library."""
    module, _, name = backends()[backend].partition(":")
    found: type[BackendSpec] = getattr(importlib.import_module(module), name)
    return found


def spec_classes() -> dict[str, type[BackendSpec]]:
    """Return the spec classes of all backends by name."""
    return {backend: spec_class(backend) for backend in backends()}


def parse_extractor(name: str, data: Any, where: str) -> BackendSpec:
    """Return the config section of extractor `name` as its backend's spec. Imports no model library.

    Args:
        name: the extractor's name in the config; it becomes part of file names.
        data: the section as parsed from YAML.
        where: key path of the section, for error messages.

    Raises:
        UserError: an invalid name, an unknown backend or key, or a value that the backend refuses.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: the name {name!r} becomes a file name: use letters, digits, '.', '_' and '-' only")
    if not isinstance(data, Mapping):
        raise UserError(f"{where} = {data!r}: expected a section with modality and backend")
    backend = data.get("backend")
    if backend is None:
        raise UserError(f"{where}.backend: required, but not given{nearest('', backends())}")
    if backend not in backends():
        raise UserError(f"{where}.backend = {backend!r}: unknown backend{nearest(backend, backends())}")
    return validate(spec_class(backend), dict(data), where)
