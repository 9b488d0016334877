"""Lists, and deletes on request, files under processed/ and results/ that no experiment or study of the configuration uses.

    python -m workflow.prune [--configfile FILE ...] [--delete]

What counts are features, captions, item graphs, their caches, repeated splits of studies, and runs. Raw files, other tables,
images, published results and files that users put into the folder of a run are never listed.
"""

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config

from cm3.common.errors import UserError
from cm3.common.paths import expand
from extractors.runtime.cache import cache_address, cached_outputs
from extractors.runtime.earlier_cache import earlier_addresses
from workflow.plan import features, runs
from workflow.plan.config import Config, load_config
from workflow.plan.data import interactions_path
from workflow.plan.experiments import Experiment
from workflow.working_directory import RunLock

ROOT = Path(__file__).resolve().parents[1]
PROCESSED, RESULTS = Path("processed"), Path("results")
GRAPH_CACHES = (".cache", ".kept")

_OUTPUT = re.compile(r"(?P<extractor>.+)-[0-9a-f]{12}(?:-pca[0-9]+)?(?:-(?:gaussian|shuffled)-[0-9]+|-constant)?")
_GRAPH = re.compile(rf"{_OUTPUT.pattern}-k[0-9]+(?:-hnsw|-ivf)?(?:-mean)?")
_RUN = re.compile(r"[0-9a-f]{12}")
_RUN_FILE = re.compile(
    r"\..+|checkpoints|tensorboard|model\.(?:safetensors|json)|history\.csv|(user|item)_embeddings\.parquet|evaluation\.json"
    r"|(per_user|recommendations)\.parquet|(train|evaluate)\.stage\.json"
)


@dataclass(frozen=True)
class Unused:
    """Something that nothing in the configuration uses.

    Attributes:
        kind: features, captions, similarity, cache, split or run.
        path: the file or folder that represents it.
        files: all its files and folders, the record and unfinished shards included.
    """

    kind: str
    path: Path
    files: Sequence[Path]

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(_size(path) for path in self.files)


@dataclass
class Used:
    """What the configuration uses.

    Attributes:
        outputs: paths of features, captions, item graphs and repeated splits.
        runs: folders of runs.
        addresses: addresses in the caches of encoder outputs.
        unknown: extractors whose key cannot be determined here -> why; everything of theirs counts as used.
        experiments: names of experiments whose runs cannot be determined here, because they use such an extractor.
    """

    outputs: set[Path] = field(default_factory=set)
    runs: set[Path] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    unknown: dict[str, str] = field(default_factory=dict)
    experiments: set[str] = field(default_factory=set)


def used_by(config: Config) -> Used:
    """Return what the experiments and studies of a configuration use."""
    used = Used()
    for name, experiment in config.experiments.items():
        for extractor in experiment.modalities.values():
            try:
                _add_extractor(config, extractor, used)
            except UserError as error:
                encoder = features.encoder_of(config, extractor)
                used.unknown |= dict.fromkeys(filter(None, (extractor, encoder)), str(error))
        if used.unknown.keys() & set(experiment.modalities.values()):
            used.experiments.add(name)
            continue
        for run, settings in runs.runs_of(config, name).items():
            used.runs.add(RESULTS / name / "runs" / run)
            used.outputs |= set(map(Path, _outputs(config, settings)))
    return used


def _add_extractor(config: Config, extractor: str, used: Used) -> None:
    encoder = features.encoder_of(config, extractor)
    tasks = {encoder or extractor: features.extract(config, extractor)}
    if encoder:
        tasks[extractor] = features.caption(config, extractor)
    for name, task in tasks.items():
        identity = features.extractor_identity(config, name)
        used.addresses.add(cache_address(identity, task.version))
        used.addresses.update(earlier_addresses(config.extractors[name].backend, identity, task.version))


def _outputs(config: Config, settings: Experiment) -> Iterator[str]:
    for modality, extractor in settings.modalities.items():
        # Reduced features are made from these, and a control from either.
        yield features.features_path(config, settings.dataset, extractor)
        yield features.features_path(config, settings.dataset, extractor, reduction=settings.reduction(modality))
        if features.encoder_of(config, extractor) is not None:
            yield features.captions_path(config, settings.dataset, extractor)
    yield from runs.features_of(config, settings).values()
    yield from runs.graphs_of(config, settings).values()
    if settings.split_seed is not None:
        yield interactions_path(settings.dataset, settings.split_seed)


def unused(config: Config, used: Used, mentioned: Iterable[Path] = ()) -> list[Unused]:
    """Return what `config` does not use, in the order of paths.

    Args:
        config: the configuration.
        used: what it uses.
        mentioned: paths that the configuration names, such as a file of vectors or an earlier run to start from; they and
            what is in them count as used.
    """
    found = [*_outputs_on_disk(used), *_caches_on_disk(used), *_splits_on_disk(config, used), *_runs_on_disk(used)]
    protected = [path.resolve() for path in mentioned]
    return sorted(
        (entry for entry in found if not any(_overlaps(path, protected) for path in entry.files)),
        key=lambda entry: entry.path,
    )


def _outputs_on_disk(used: Used) -> Iterator[Unused]:
    for kind, pattern, name in (
        ("features", "*/features/*/*.parquet", _OUTPUT),
        ("captions", "*/captions/*.parquet", _OUTPUT),
        ("similarity", "*/similarity/*.parquet", _GRAPH),
    ):
        for path in sorted(PROCESSED.glob(pattern)):
            match = name.fullmatch(path.stem)
            if match and path not in used.outputs and match["extractor"] not in used.unknown:
                yield Unused(kind, path, [path, *_companions(path)])


def _companions(path: Path) -> list[Path]:
    record = Path(features.record_path(str(path)))
    projection = path.with_suffix(".safetensors")
    hidden = [path.with_name(f".{path.name}.lock"), *path.parent.glob(f".{path.name}.shards-*")]
    return [companion for companion in (record, projection, *hidden) if companion.exists()]


def _caches_on_disk(used: Used) -> Iterator[Unused]:
    for cached in cached_outputs(PROCESSED):
        output = cached.folder.parents[2] / f"{cached.folder.parent.name}.parquet"
        current = output in used.outputs and cached.address in used.addresses
        if not current and cached.extractor not in used.unknown:
            yield Unused("cache", cached.folder, [cached.folder])
    for name in GRAPH_CACHES:
        for path in sorted(PROCESSED.glob(f"*/similarity/{name}/*.parquet")):
            match = _GRAPH.fullmatch(path.stem)
            output = path.parents[1] / path.name
            if match and output not in used.outputs and match["extractor"] not in used.unknown:
                yield Unused("cache", path, [path])


def _splits_on_disk(config: Config, used: Used) -> Iterator[Unused]:
    undetermined = {config.experiments[name].dataset for name in used.experiments}
    for path in sorted(PROCESSED.glob("*/splits/*/interactions.parquet")):
        if path not in used.outputs and path.parents[2].name not in undetermined:
            record = path.with_name("split.stage.json")
            yield Unused("split", path, [path, record] if record.exists() else [path])


def _runs_on_disk(used: Used) -> Iterator[Unused]:
    for folder in sorted(RESULTS.glob("*/runs/*/")):
        name = folder.parents[1].name
        own = sorted(path for path in folder.iterdir() if _RUN_FILE.fullmatch(path.name))
        if own and _RUN.fullmatch(folder.name) and folder not in used.runs and name not in used.experiments:
            yield Unused("run", folder, own)


def _overlaps(path: Path, protected: Sequence[Path]) -> bool:
    own = path.resolve()
    return any(own.is_relative_to(other) or other.is_relative_to(own) for other in protected)


def paths_in(raw: Any) -> set[Path]:
    """Return the existing files and folders that a configuration names anywhere."""
    if isinstance(raw, Mapping):
        return {path for value in raw.values() for path in paths_in(value)}
    if isinstance(raw, list):
        return {path for value in raw for path in paths_in(value)}
    if not isinstance(raw, str) or "/" not in raw:
        return set()
    try:
        path = Path(expand(raw))
        return {path} if path.exists() else set()
    except (UserError, OSError, ValueError):
        return set()


def read_config(files: Sequence[Path]) -> dict[str, Any]:
    """Return the configuration as Snakemake reads it: config/config.yaml, with `files` over it in their order.

    Raises:
        UserError: a file does not exist or is not a YAML mapping.
    """
    base = Path("config/config.yaml")
    raw: dict[str, Any] = {}
    for path in (base if base.exists() else ROOT / base, *files):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: is not a mapping of datasets, extractors and experiments")
        update_config(raw, content)
    return raw


def table(entries: Sequence[Unused]) -> str:
    """Return a line for each entry, with its size, and the total."""
    lines = [f"{_human(entry.bytes):>9}  {entry.kind:<10}  {entry.path}" for entry in entries]
    return "\n".join([*lines, f"{_human(sum(entry.bytes for entry in entries)):>9}  in {len(entries)} entries"])


def delete(entries: Iterable[Unused]) -> None:
    """Delete all files and folders of the entries."""
    for entry in entries:
        for path in entry.files:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # A folder with files of a user stays, and entry.path may be a file.
            entry.path.rmdir()


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def prune(files: Sequence[Path], deletes: bool) -> str:
    """List what the configuration does not use, delete it if `deletes`, and return the report.

    Raises:
        UserError: an invalid configuration, or a run in this folder while files are to be deleted.
    """
    if deletes:
        RunLock().acquire()
    raw = read_config(files)
    config = load_config(raw, files)
    used = used_by(config)
    entries = unused(config, used, paths_in(raw))
    lines = [
        f"Everything of extractor {name} is kept, because its key cannot be determined here: {reason}"
        for name, reason in used.unknown.items()
    ]
    names = ", ".join(["config/config.yaml", *map(str, files)])
    if not entries:
        return "\n".join([*lines, f"Nothing is unused under {names}."])
    sizes = table(entries)
    if deletes:
        delete(entries)
        return "\n".join([*lines, f"Deleted, because no experiment or study of {names} uses it:", sizes])
    again = " ".join(["./run prune --delete", *(f"--configfile {file}" for file in files)])
    return "\n".join(
        [
            *lines,
            f"No experiment or study of {names} uses:",
            table(entries),
            f"Nothing was deleted. To delete it: {again}",
        ]
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="./run prune", description=__doc__.split("\n")[0])
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], metavar="FILE", help="as for snakemake")
    parser.add_argument("--delete", action="store_true", help="delete what is listed")
    arguments = parser.parse_args()
    try:
        print(prune(arguments.configfile, arguments.delete))
    except UserError as error:
        sys.exit(f"prune: {error}")


if __name__ == "__main__":
    main()
