"""Datasets: the inputs and tasks of generating, downloading, preparing, splitting and collecting images.

Every function takes the checked configuration first. The parameters after it are named like the wildcards of the rules.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.http import conceal, without_secrets
from cm3.common.input_files import check_readable
from cm3.common.paths import check_folder, check_kind, check_writable, expand
from cm3.datasets.raw_files import read_record
from workflow.plan.config import Config
from workflow.plan.folder import digest_of_folder
from workflow.plan.task import Task

DOWNLOADS = "download"
"""Folder in raw/{dataset}/ of the files that the pipeline downloads, by their published paths."""


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

    Args:
        config: the configuration.
        dataset: name of the dataset.
        file: path of the published file, relative to a mirror.

    Raises:
        UserError: the dataset has no such file.
    """
    files = config.datasets[dataset].downloads(dataset)
    places = {spec["path"]: place for place, spec in files.items()}
    if file not in places:
        raise UserError(f"{file}: dataset {dataset!r} has no such file; it has {', '.join(places)}")
    place = places[file]
    spec = files[place] | {"urls": conceal(files[place]["urls"])}
    # The bytes of a published file depend neither on the code that downloads them nor on checks of them.
    return Task("download", spec, runtime={"place": place}, decides={"path": file}, versioned=False)


def check_raw_folders(config: Config) -> None:
    """Raise UserError for a file in the place of raw/ or of a folder in it, on which Snakemake ends with a traceback."""
    check_folder("raw")
    for dataset in config.datasets:
        if Path("raw", dataset).is_file():
            check_folder(Path("raw", dataset))


def published_files(config: Config) -> list[str]:
    """Return the paths in raw/ where users put published files themselves, of all datasets."""
    return [path for name, dataset in config.datasets.items() for path in dataset.downloads(name)]


def raw_files(config: Config, dataset: str, paths: Mapping[str, str]) -> dict[str, str]:
    """Return raw files by name, with published ones that nobody put into raw/{dataset}/ in raw/{dataset}/download/.

    Only the second folder has outputs of a rule: Snakemake removes outputs, and a user's file is never one.

    Raises:
        UserError: a file cannot be there, because the path is a folder, a link to nothing, or cannot be written to.
    """
    files = config.datasets[dataset].downloads(dataset)
    located = {}
    for name, path in paths.items():
        located[name] = path
        if path in files and not _is_in_place(config, path, files[path]["path"]):
            located[name] = f"raw/{dataset}/{DOWNLOADS}/{files[path]['path']}"
            check_writable(located[name])
    return located


def _is_in_place(config: Config, path: str, published: str) -> bool:
    """Return whether a published file is in raw/{dataset}/: put there by a user, or downloaded by an earlier release."""
    check_kind(path)
    if not config.exists(path):
        return False
    if not Path(path).exists():
        return True  # It is in an object storage.
    record = read_record(Path(path))
    url = record.get("url")
    if not isinstance(url, str) or record.get("bytes") != Path(path).stat().st_size:
        return True
    # Other generations of a source have files of the same name.
    return any(address.endswith(f"/{published}") for address in (url, without_secrets(url)))


def prepare_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the raw files of a dataset.

    Raises:
        UserError: one of the user's own tables does not exist or cannot be read.
    """
    inputs = config.datasets[dataset].prepare_inputs(dataset)
    if config.local and config.datasets[dataset].source == "files":
        for name, path in inputs.items():
            check_readable(Path(path), f"datasets.{dataset}.{name.partition('.')[0]}.path")
    return raw_files(config, dataset, inputs)


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
    earlier = prepare(config, dataset).made_from
    return Task("split", split_spec(config, dataset), runtime=config.datasets[dataset].split_runtime(), earlier=earlier)


def repeat_split(config: Config, dataset: str, split_seed: str) -> Task:
    """Return the task of labelling interactions by a further random split, for studies with `split.repeats`."""
    earlier = prepare(config, dataset).made_from
    return Task("split", split_spec(config, dataset, int(split_seed)), earlier=earlier)


def split_spec(config: Config, dataset: str, split_seed: int | None = None) -> dict[str, Any]:
    """Return the settings of the split of a dataset, with another seed where one is given."""
    return config.datasets[dataset].split_spec() | ({} if split_seed is None else {"seed": split_seed})


def interactions_path(dataset: str, split_seed: int | None = None) -> str:
    """Return the labelled interactions of a dataset: of its own split, or of a further one."""
    folder = "" if split_seed is None else f"splits/{split_seed}/"
    return f"processed/{dataset}/{folder}interactions.parquet"


def review_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the files with texts of reviews, and the tables of the interactions that they belong to.

    Raises:
        UserError: the dataset has no reviews.
    """
    chosen = config.datasets[dataset]
    inputs = chosen.review_inputs(dataset)
    if not inputs:
        hint = "; name the column of reviews in interactions.columns.review" if chosen.source == "files" else ""
        raise UserError(f"datasets.{dataset}: source {chosen.source!r} has no texts of reviews{hint}")
    base = f"processed/{dataset}"
    tables = {name: f"{base}/{name}.parquet" for name in ("ratings", "users", "items")}
    return raw_files(config, dataset, inputs) | tables


def reviews(config: Config, dataset: str) -> Task:
    """Return the task of collecting the texts of reviews."""
    chosen = config.datasets[dataset]
    earlier = prepare(config, dataset).made_from
    return Task("reviews", chosen.reviews_spec(), {chosen.source: chosen}, earlier=earlier)


def user_groups_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the users' table of a dataset, and the table of its users.

    Raises:
        UserError: the dataset has no users' table, or it cannot be read.
    """
    chosen = config.datasets[dataset]
    inputs = chosen.user_groups_inputs(dataset)
    if not inputs:
        keys = {"files": "users.columns.groups", "recbole": "user_groups"}
        hint = f"; name them in {keys[chosen.source]}" if chosen.source in keys else ""
        raise UserError(f"datasets.{dataset}: names no columns of users to compare{hint}")
    if config.local:
        for path in inputs.values():
            check_readable(Path(path), f"datasets.{dataset}.users.path" if chosen.source == "files" else "")
    return inputs | {"users": f"processed/{dataset}/users.parquet"}


def user_groups(config: Config, dataset: str) -> Task:
    """Return the task of grouping the users of a dataset by columns of its users' table."""
    chosen = config.datasets[dataset]
    earlier = prepare(config, dataset).made_from
    return Task("user-groups", chosen.user_groups_spec(), {chosen.source: chosen}, earlier=earlier)


def user_groups_path(config: Config, dataset: str) -> dict[str, str]:
    """Return the groups of the users as an input; empty for a dataset without a users' table."""
    named = config.datasets[dataset].user_groups_inputs(dataset)
    return {"user_groups": f"processed/{dataset}/user_groups.parquet"} if named else {}


def image_inputs(config: Config, dataset: str) -> dict[str, str]:
    """Return the files that list a dataset's images, besides the item table.

    Raises:
        UserError: the user's own folder of images does not exist.
    """
    chosen = config.datasets[dataset]
    folder = chosen.image_folder()
    # Here and not in `images`: Snakemake reports a fault of an input in one line, one of a parameter with a traceback.
    if config.local and folder and not Path(folder).is_dir():
        raise UserError(f"datasets.{dataset}.images.folder = {folder!r}: no such folder; correct the path")
    return chosen.image_inputs(dataset)


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
    "reviews": reviews,
    "user_groups": user_groups,
    "manifest": images,
}
STAGES = frozenset({"prepare", "split", "reviews", "user-groups", "images"})
"""Stages whose outputs have paths without a key of their settings, and hold `made_from`."""

_TABLE = re.compile(
    rf"(?:^|/)processed/(?P<dataset>[^/]+)/(?:images/|splits/(?P<split_seed>[0-9]+)/)?(?P<table>{'|'.join(_MAKERS)})\.parquet$"
)


def expected_settings(config: Config, inputs: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what each table of a data set among the inputs of a job must be made from, by its name.

    The paths of these tables do not hold a key of their settings, so that a table can be that of another configuration.

    Args:
        inputs: paths by name. Names with a dot are a user's copies (`keep.items`), which are of any settings.
    """
    expected = {}
    for name, path in inputs.items():
        found = _TABLE.search(path)
        if found and "." not in name and found["dataset"] in config.datasets:
            expected[name] = _made_from(config, found["table"], found["dataset"], found["split_seed"])
    return expected


@functools.lru_cache(maxsize=1024)
def _made_from(config: Config, table: str, dataset: str, split_seed: str | None) -> dict[str, str]:
    # Cached, because the settings of a folder of images are those of its files.
    if split_seed is not None:
        return repeat_split(config, dataset, split_seed).made_from
    return _MAKERS[table](config, dataset).made_from
