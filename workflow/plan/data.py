"""Datasets: the inputs and tasks of generating, downloading, preparing, splitting and collecting images.

Every function takes the checked configuration first. The parameters after it are named like the wildcards of the rules.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.input_files import check_readable
from cm3.common.paths import expand
from workflow.plan.config import Config
from workflow.plan.folder import digest_of_folder
from workflow.plan.task import Task


def generated(config: Config) -> list[str]:
    """Return the names of the datasets that the generator of the sample shop draws."""
    return [name for name, dataset in config.datasets.items() if dataset.generate_spec() is not None]


def generate(config: Config, dataset: str) -> Task:
    """Return the task of drawing one of the datasets of `generated`.

    Raises:
        UserError: the dataset is of another source.
    """
    spec = generator_spec(config, dataset)
    if spec is None:
        raise UserError(f"datasets.{dataset}: source {config.datasets[dataset].source!r} is not generated")
    return Task("generate", spec)


def generator_spec(config: Config, dataset: str) -> dict[str, Any] | None:
    """Return the settings of the generator, None for a dataset that is read from files."""
    return config.datasets[dataset].generate_spec()


def downloaded(config: Config) -> list[str]:
    """Return the names of datasets that have files to download."""
    return [name for name, dataset in config.datasets.items() if dataset.downloads(name)]


def download(config: Config, dataset: str, file: str) -> Task:
    """Return the task of downloading a raw file. Its identity is the published file, whichever mirror serves it.

    Raises:
        UserError: the dataset has no such file.
    """
    files = config.datasets[dataset].downloads(dataset)
    path = f"raw/{dataset}/{file}"
    if path not in files:
        raise UserError(f"{path}: dataset {dataset!r} has no such file; it has {', '.join(files)}")
    expected = {name: value for name, value in files[path].items() if name != "urls"}
    # The bytes of a published file do not depend on the code that downloads them.
    return Task("download", files[path], decides=expected, versioned=False)


def prepare_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the raw files of a dataset.

    Raises:
        UserError: one of the user's own tables does not exist or cannot be read.
    """
    inputs = config.datasets[dataset].prepare_inputs(dataset)
    if config.local and config.datasets[dataset].source == "files":
        for name, path in inputs.items():
            check_readable(Path(path), f"datasets.{dataset}.{name}.path")
    return inputs


def prepare(config: Config, dataset: str) -> Task:
    """Return the task of turning raw files into k-cored tables."""
    chosen = config.datasets[dataset]
    return Task("prepare", chosen.prepare_spec(), {chosen.source: chosen})


def split_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the ratings; with `split.keep` also the earlier tables, whose labels are kept, and the ids to match them.

    Raises:
        UserError: the earlier tables are missing, or are among those that this preparation replaces.
    """
    base = f"processed/{dataset}"
    paths = {"ratings": f"{base}/ratings.parquet"}
    keep = config.datasets[dataset].split.keep
    if keep is None:
        return paths
    keep = expand(keep)
    if Path(keep).resolve().is_relative_to(Path(base).resolve()):
        raise UserError(
            f"datasets.{dataset}.split.keep = {keep!r}: is in the folder that this preparation replaces; copy its "
            "tables elsewhere and name the copy"
        )
    earlier = {f"keep.{name}": f"{keep}/{name}.parquet" for name in ("interactions", "items", "users")}
    # Snakemake takes an output whose inputs are missing for up to date.
    absent = [path for path in earlier.values() if not Path(path).is_file()]
    if absent:
        raise UserError(f"datasets.{dataset}.split.keep = {keep!r}: {absent[0]} does not exist")
    return paths | {name: f"{base}/{name}.parquet" for name in ("items", "users")} | earlier


def split(config: Config, dataset: str) -> Task:
    """Return the task of labelling interactions train, valid or test."""
    return Task("split", config.datasets[dataset].split_spec(), earlier=prepare(config, dataset).made_from)


def image_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the files that list a dataset's images, besides the item table."""
    return config.datasets[dataset].image_inputs(dataset)


def images(config: Config, dataset: str) -> Task:
    """Return the task of collecting images; the contents of a user's own folder are part of its identity."""
    chosen = config.datasets[dataset]
    folder = chosen.image_folder()
    digest = digest_of_folder(Path(folder)) if folder else None
    spec = chosen.images_spec()
    earlier = prepare(config, dataset).made_from
    return Task("images", spec, runtime=chosen.images_runtime(), decides=[spec, digest], earlier=earlier)


_MAKERS = {
    "ratings": prepare,
    "items": prepare,
    "users": prepare,
    "interactions": split,
    "manifest": images,
}
STAGES = frozenset({"prepare", "split", "images"})
"""Stages whose outputs have paths without a key of their settings, and hold `made_from`."""

_TABLE = re.compile(rf"(?:^|/)processed/([^/]+)/(?:images/)?({'|'.join(_MAKERS)})\.parquet$")


def expected_settings(config: Config, inputs: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what each table of a data set among the inputs of a job must be made from, by its name.

    The paths of these tables do not hold a key of their settings, so that a table can be that of another configuration.

    Args:
        inputs: paths by name. Names with a dot are a user's copies (`keep.items`), which are of any settings.
    """
    expected = {}
    for name, path in inputs.items():
        found = _TABLE.search(path)
        if found and "." not in name and found[1] in config.datasets:
            expected[name] = _made_from(config, found[2], found[1])
    return expected


@functools.lru_cache(maxsize=1024)
def _made_from(config: Config, table: str, dataset: str) -> dict[str, str]:
    # Cached, because the settings of a folder of images are those of its files.
    return _MAKERS[table](config, dataset).made_from
