"""Extractors: text, image, caption, multimodal and precomputed vectors of items. Usable as a library.

>>> import io
>>> from PIL import Image
>>> import extractors
>>> file = io.BytesIO()
>>> Image.new("RGB", (40, 30), "red").save(file, "PNG")
>>> extractor = extractors.load({"modality": "image", "backend": "descriptor"})
>>> encoded = extractor.encode([{"image": file.getvalue()}, {"image": b"no image"}, {"title": "red shoe"}])
>>> encoded.embedding.shape, encoded.embedding.dtype
((3, 1101), dtype('float32'))
>>> encoded.status.tolist()
['ok', 'failed', 'missing']
>>> encoded.errors
{1: "not an image; it starts with b'no image'"}

Importing this package or parsing a spec imports no model library; only `load` does.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from extractors.extractor import Extractor
    from extractors.spec import BackendSpec

__all__ = ["load", "parse_extractor"]


def load(spec: "BackendSpec | Mapping[str, Any]", name: str = "extractor") -> "Extractor[Any]":
    """Return the extractor of a spec, with its model loaded on its device.

    Its `encode(items)` takes N mappings with the keys of items.parquet (title, brand, categories, ...) and `image`
    (bytes or a path), and returns (N, d) float32 vectors, a status per row, and the reasons of failures. A captioner
    has `caption(items)` instead. A spec's `reduce` is not applied: it is fitted to a data set, by a stage of its own.

    Args:
        spec: a parsed spec, or a mapping as in a config file.
        name: name of the extractor in error messages.

    Raises:
        UserError: the spec is invalid, or the model's weights cannot be loaded.
    """
    from extractors.registry import parse_extractor
    from extractors.spec import BackendSpec

    parsed = spec if isinstance(spec, BackendSpec) else parse_extractor(name, spec, name)
    extractor: Extractor[Any] = cast(Any, parsed.load())
    return extractor


def __getattr__(name: str) -> Any:
    if name == "parse_extractor":
        from extractors.registry import parse_extractor

        return parse_extractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
