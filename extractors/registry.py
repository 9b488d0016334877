"""The backends: name -> "module:Class" of the spec, which knows its own implementation. One line makes a new one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extractors.spec import ExtractorSpec

BACKENDS = {
    "sentence-transformers": "extractors.text.sentence_transformers:SentenceTransformersSpec",
    "transformers-text": "extractors.text.transformers:TransformersTextSpec",
    "timm": "extractors.image.timm:TimmSpec",
    "open_clip": "extractors.image.open_clip:OpenClipSpec",
    "transformers-vision": "extractors.image.transformers:TransformersVisionSpec",
    "descriptor": "extractors.image.descriptor:DescriptorSpec",
    "transformers-mllm": "extractors.multimodal.transformers:TransformersMllmSpec",
    "transformers-caption": "extractors.caption.transformers:TransformersCaptionSpec",
    "vllm-caption": "extractors.caption.vllm:VllmCaptionSpec",
    "openai-caption": "extractors.caption.openai:ServerCaptionSpec",
    "precomputed": "extractors.precomputed.reader:PrecomputedSpec",
}


def spec_class(backend: str) -> "type[ExtractorSpec]":
    """Return the spec class of a backend; its module loads without any model library."""
    module, _, name = BACKENDS[backend].partition(":")
    return getattr(importlib.import_module(module), name)


def spec_classes() -> "dict[str, type[ExtractorSpec]]":
    """Return every backend's spec class by name, for JSON Schema and documentation."""
    return {backend: spec_class(backend) for backend in BACKENDS}
