"""The sources of data by name: config models, and the modules that stages import for them. Imports nothing heavy."""

import re
from typing import Any, get_args

from cm3.common.errors import UserError
from cm3.common.strict import nearest, validate
from cm3.datasets.amazon.config import Amazon2014, Amazon2018, Amazon2023
from cm3.datasets.base_config import Dataset
from cm3.datasets.files.config import Files
from cm3.datasets.microlens.config import MicroLens
from cm3.datasets.mmrec.config import MMRec
from cm3.datasets.sample.config import Sample

SOURCES: dict[str, type[Dataset]] = {
    get_args(model.model_fields["source"].annotation)[0]: model
    for model in (Sample, Files, Amazon2014, Amazon2018, Amazon2023, MicroLens, MMRec)
}

# One line a source. Stages import these by name, so that an edit of one parser reruns its own data sets only.
READERS = {
    "sample": "cm3.datasets.amazon.v2014",
    "files": "cm3.datasets.files.reader",
    "amazon-2014": "cm3.datasets.amazon.v2014",
    "amazon-2018": "cm3.datasets.amazon.v2018",
    "amazon-2023": "cm3.datasets.amazon.v2023",
    "microlens": "cm3.datasets.microlens.reader",
    "mmrec": "cm3.datasets.mmrec.reader",
}
FINDERS = {
    "none": "cm3.datasets.images.none",
    "folder": "cm3.datasets.images.folder",
    "urls": "cm3.datasets.images.web",
}


def stage_modules(dataset: Dataset) -> dict[str, list[str]]:
    """Return the modules that a stage imports by name for a data set, for the digest of its code."""
    return {"prepare": [READERS[dataset.source]], "images": [FINDERS[dataset.images_spec()["find"]]]}


def parse_dataset(name: str, data: Any, where: str) -> Dataset:
    """Return a data set's config, checked.

    Args:
        name: the data set's name, a key under `datasets`; it becomes a folder name.
        data: the mapping that YAML gave.
        where: its key path for messages, such as datasets.baby.

    Raises:
        UserError: one line per fault, with the key's path, the value and the nearest valid name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"{where}: the name {name!r} becomes a folder; use letters, digits, _ and - only")
    if not isinstance(data, dict):
        raise UserError(f"{where} = {data!r}: must be a mapping with a source, one of {', '.join(SOURCES)}")
    source = data.get("source")
    if source is None:
        raise UserError(f"{where}.source: required, but not given; one of {', '.join(SOURCES)}")
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"{where}.source = {source!r}: there is no such source{nearest(source, SOURCES)}")
    return validate(SOURCES[source], data, where)
