"""The backends: name -> "module:Class" of the spec, which knows its own implementation. One line makes a new one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extractors.spec import ExtractorSpec

BACKENDS = {
    "sentence-transformers": "extractors.sentence_text:SentenceTransformersSpec",
    "transformers-text": "extractors.transformers_text:TransformersTextSpec",
    "timm": "extractors.timm_image:TimmSpec",
    "open_clip": "extractors.open_clip_image:OpenClipSpec",
    "transformers-vision": "extractors.transformers_vision:TransformersVisionSpec",
    "descriptor": "extractors.descriptor:DescriptorSpec",
    "transformers-mllm": "extractors.transformers_mllm:TransformersMllmSpec",
    "transformers-caption": "extractors.transformers_caption:TransformersCaptionSpec",
    "vllm-caption": "extractors.captions_vllm:VllmCaptionSpec",
    "openai-caption": "extractors.captions_server:ServerCaptionSpec",
    "precomputed": "extractors.precomputed:PrecomputedSpec",
}


def spec_class(backend: str) -> "type[ExtractorSpec]":
    """Return the spec class of a backend; its module loads without any model library."""
    module, _, name = BACKENDS[backend].partition(":")
    return getattr(importlib.import_module(module), name)


def spec_classes() -> "dict[str, type[ExtractorSpec]]":
    """Return every backend's spec class by name, for JSON Schema and documentation."""
    return {backend: spec_class(backend) for backend in BACKENDS}
