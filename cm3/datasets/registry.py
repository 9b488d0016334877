"""Registry of dataset sources and of image sources, by the names that a configuration uses. Imports nothing heavy."""

import functools
import importlib
import re
from typing import Any

from cm3.common.errors import UserError
from cm3.common.strict import nearest, validate
from cm3.datasets.spec import SourceSpec

SOURCES = {
    "sample": "cm3.datasets.sample.config:SampleSpec",
    "files": "cm3.datasets.files.config:FilesSpec",
    "amazon-2014": "cm3.datasets.amazon.config:Amazon2014Spec",
    "amazon-2018": "cm3.datasets.amazon.config:Amazon2018Spec",
    "amazon-2023": "cm3.datasets.amazon.config:Amazon2023Spec",
    "microlens": "cm3.datasets.microlens.config:MicroLensSpec",
    "mmrec": "cm3.datasets.mmrec.config:MMRecSpec",
    "recbole": "cm3.datasets.recbole.config:RecBoleSpec",
}
"""`source` of a dataset -> module:class of its SourceSpec."""

IMAGE_SOURCES = {
    "none": "cm3.datasets.images.none:find",
    "folder": "cm3.datasets.images.folder:find",
    "urls": "cm3.datasets.images.web:find",
    "embedded": "cm3.datasets.images.embedded:find",
}
"""`find` of an images_spec() -> module:function that finds the images."""


@functools.cache
def source_spec(name: str) -> type[SourceSpec]:
    """Return the SourceSpec of a source of `SOURCES`."""
    spec: type[SourceSpec] = _load(SOURCES[name])
    return spec


def source_specs() -> dict[str, type[SourceSpec]]:
    """Return the SourceSpec of every source by name."""
    return {name: source_spec(name) for name in SOURCES}


def image_source(name: str) -> Any:
    """Return the function of an image source of `IMAGE_SOURCES`; its module is imported here."""
    return _load(IMAGE_SOURCES[name])


def parse_dataset(name: str, data: Any, where: str) -> SourceSpec:
    """Return the checked settings of a dataset.

    Args:
        name: the dataset's name, a key under `datasets`; it becomes a folder name.
        data: the dataset's section of the configuration.
        where: the section's key path for messages, such as datasets.baby.

    Raises:
        UserError: one line per fault, with the key's path, the value and the nearest valid name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"{where}: the name {name!r} becomes a folder name; use letters, digits, _ and - only")
    if not isinstance(data, dict):
        raise UserError(f"{where} = {data!r}: must be a mapping with a source, one of {', '.join(SOURCES)}")
    source = data.get("source")
    if source is None:
        raise UserError(f"{where}.source: required, but not given; one of {', '.join(SOURCES)}")
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"{where}.source = {source!r}: unknown source{nearest(source, SOURCES)}")
    return validate(source_spec(source), data, where)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
