"""Runs one extractor over a dataset: cache lookup, shards, provenance and record, for the extract and caption stages."""

import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import Call, versions
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.progress import Progress
from cm3.common.tables import FAILED, MISSING, OK
from extractors.extractor import Model
from extractors.registry import parse_extractor
from extractors.runtime.cache import OutputCache, cache_address, cache_folder, set_aside
from extractors.runtime.earlier_cache import adopt_earlier, earlier_addresses
from extractors.runtime.library_versions import VersionCounts, installed_versions
from extractors.runtime.shards import Shards, notes_of, with_notes
from extractors.runtime.source import Source, require_some
from extractors.runtime.unique_inputs import UniqueInputs
from extractors.spec import BackendSpec

log = logging.getLogger(__name__)

FAILURES_RECORDED = 20


def spec_of(call: Call) -> tuple[str, BackendSpec]:
    """Return the extractor's name and spec from a stage's --spec and --runtime.

    Raises:
        UserError: the model on this machine is not the one that the job was planned with (`identity`).
    """
    name = call.spec.get("name", "extractor")
    runtime = {key: value for key, value in call.runtime.items() if key != "threads"}
    if runtime.get("workers") is None:
        runtime["workers"] = call.runtime.get("threads")
    if "vectors" in call.inputs:
        runtime["path"] = str(call.inputs["vectors"])
    if "ids" in call.inputs and runtime.get("ids") is None:
        runtime["ids"] = str(call.inputs["ids"])
    spec = parse_extractor(name, {**call.spec.get("settings", {}), **runtime}, f"extractors.{name}")
    found = spec.identity()
    for key, planned in call.spec.get("identity", {}).items():
        if key in found and found[key] != planned:
            raise UserError(
                f"extractors.{name}: {key} is {found[key]!r} here, but the job was planned with {planned!r}; "
                "the model has changed since; run the same command again"
            )
    return name, spec


class Job:
    """One extractor over all items of a dataset, in shards; its model is loaded once, and only if there is work.

    Outputs of inputs that an earlier job with the same model, settings and versions encoded come from the cache. Of
    several equal inputs one is encoded for all. Without versions of the code (`code`) nothing is cached.

    Attributes:
        source: inputs of the items.
        status, errors: by row, filled in by `tables`.
    """

    def __init__(
        self, spec: BackendSpec, inputs: Mapping[str, Path], output: Path, name: str, code: str, threads: int | None
    ) -> None:
        self.spec, self.name, self.code, self.threads = spec, name, code, threads
        self.source: Source[Any] = spec.read(inputs)
        require_some(self.source, name, spec.modality)
        self.identity = spec.identity()
        self.address = cache_address(self.identity, code)
        self.caches = bool(code) and spec.cached
        earlier = earlier_addresses(spec.backend, self.identity, code) if self.caches else []
        adopt_earlier(output, earlier, cache_folder(output, self.address))
        self._output, self._earlier = output, earlier
        self._find_work()
        self.status, self.errors = self.source.status.copy(), dict(self.source.errors)
        self._model: Model[Any] | None = None
        self._facts: dict[str, Any] = {}
        self._record: dict[str, Any] = {}
        self._versions = VersionCounts()

    def _find_work(self) -> None:
        """Determine which rows are cached, and divide the other inputs into shards."""
        self._look_up()
        leftovers = list(self.shards.leftovers())
        for folder, address, work in leftovers:
            # A job was interrupted before its inputs changed, or ran at another version.
            self._store(folder, self.address if address in self._earlier else address, work)
        if leftovers:
            self._look_up()

    def _look_up(self) -> None:
        self.cache = OutputCache(self._output, self.address if self.caches else None)
        rows = self.source.rows
        positions = self.cache.find(self.source.digests)[rows]
        self._cached, self._positions = rows[positions >= 0], positions[positions >= 0]
        self.work = UniqueInputs(rows[positions < 0], self.source.digests)
        inputs = hashlib.sha256(b"".join(self.work.digests.to_pylist())).hexdigest()
        self.shards = Shards(self._output, self.address, [inputs, self.spec.items_per_shard()])

    def _cached_tables(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (rows, table) per file of the cache; the rows of a damaged file are added to the work."""
        left = np.ones(len(self.source.item_ids), bool)
        whole = False
        while not whole:
            wanted = left[self._cached]
            try:
                for some, table in self.cache.read(self._cached[wanted], self._positions[wanted]):
                    left[some] = False
                    yield some, table
                whole = True
            except DamagedFileError as error:
                set_aside(error)
                self._find_work()

    def _store(self, folder: Path, address: str, work: str) -> None:
        """Move a folder of shards into the cache; remove it where nothing is cached."""
        if self.caches:
            self.cache.add(folder, address, work)
        shutil.rmtree(folder, ignore_errors=True)

    def tables(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (rows, table) per cache file, then per shard; the table has output, status and error.

        Raises:
            UserError: the model cannot be loaded, its output is invalid, or every input failed.
        """
        counts: dict[str, int] = {}
        notes: dict[str, Any] = {}
        done, new, repeated, loading, start = 0, 0, 0, 0.0, time.perf_counter()
        with Progress(len(self.status), "items") as progress:

            def work(part: np.ndarray) -> pa.Table:
                nonlocal new, loading
                if self._model is None:
                    clock = time.perf_counter()
                    self._model = self._load(len(rows) - done)
                    loading = time.perf_counter() - clock
                new += len(part)
                result = self._model.run(self.source.stream(part), progress.advance)
                result.check([self.source.item_ids[row] for row in part])
                columns = result.columns(self.spec.dtype) | {
                    "digest": self.source.digests.take(pa.array(part)),
                    "status": pa.array(result.status.tolist(), pa.string()),
                    "error": pa.array([result.errors.get(row) for row in range(len(part))], pa.string()),
                }
                notes = {
                    "facts": self._model.facts(),
                    "device": self._model.device,
                    "counts": result.counts,
                    "library_versions": installed_versions(self.spec.libraries),
                }
                return with_notes(pa.table(columns), notes)

            without_input = self.status != OK
            progress.advance(int(without_input.sum()), **_counts(self.status[without_input]))
            for some, table in self._cached_tables():
                notes = notes_of(table)
                self._versions.add(notes.get("library_versions"), len(some))
                progress.advance(len(some), ok=len(some))
                yield some, table
            rows = self.work.rows
            for part, table, before in self.shards.run(rows, self.spec.items_per_shard(), work):
                notes = notes_of(table)
                counts = {key: counts.get(key, 0) + count for key, count in notes["counts"].items()}
                same, groups = self.work.members(done, done + len(part))
                done += len(part)
                table = table.take(pa.array(groups))
                self.status[same] = table.column("status").to_pylist()
                self._versions.add(notes.get("library_versions"), int((self.status[same] == OK).sum()))
                failed = zip(same.tolist(), table.column("error").to_pylist(), strict=True)
                self.errors |= {row: error for row, error in failed if error}
                # The model itself reports progress on the rows that it encodes.
                silent = same if before else np.setdiff1d(same, part)
                progress.advance(len(silent), **_counts(self.status[silent]))
                repeated += 0 if before else len(silent)
                yield same, table
        if not (self.status == OK).any():
            # With these shards, which hold failures only, the same command would end here without another attempt.
            self.shards.discard()
            reason = next(iter(self.errors.values()), "unknown")
            raise UserError(f"{self.name}: all {len(self.source.rows)} inputs failed, first reason: {reason}")
        seconds = max(time.perf_counter() - start - loading, 1e-9)
        self._facts = notes["facts"]
        self._record = {
            **counts,
            "kept": len(self.source.rows) - new - repeated,
            "encoded": new,
            "repeated": repeated,
            "device": notes["device"],
            "items_per_second": new / seconds,
            "load_seconds": loading,
        }

    def _load(self, items: int) -> Model[Any]:
        # Threads that spin while they wait take the CPUs from other jobs: on shared cores this costs a factor of 2 to 4.
        # Must be set before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Libraries log each file that they open.
        logging.disable(logging.INFO)
        try:
            self.spec.check_cpu_time(items)
            model = self.spec.load()
        finally:
            logging.disable(logging.NOTSET)
        torch = sys.modules.get("torch")
        if torch is not None and self.threads:
            torch.set_num_threads(self.threads)
        return model

    def provenance(self) -> dict[str, Any]:
        """Return the metadata of the output file; nothing in it depends on when or how fast it was made."""
        return {
            "extractor": self.name,
            "spec": self.spec.settings(),
            "identity": self.identity,
            "dtype": self.spec.dtype,
            **self._facts,
            "library_versions": self._versions.rows(),
            "versions": versions(self.spec.libraries),
            "code": self.code,
        }

    def finish(self) -> dict[str, Any]:
        """Move the shards into the cache, once the output is written; return the record: counts, first failures, speed.

        kept + encoded + repeated are the items with an input: found in the cache, encoded, and equal to an encoded one.
        Other counts, such as truncated_texts, are of the encoded ones. library_versions has the rows made with each
        version of the backend's libraries.
        """
        if self.shards.folder.exists():
            self._store(self.shards.folder, self.address, self.shards.work)
        without = len(self.status) - len(self.source.rows)
        log.info(
            "%s: %s items: %s cached, %s encoded%s%s",
            self.name,
            *(f"{count:,}" for count in (len(self.status), self._record["kept"], self._record["encoded"])),
            f", {self._record['repeated']:,} equal to one of these" if self._record["repeated"] else "",
            f", {without:,} without input" if without else "",
        )
        failed = np.flatnonzero(self.status == FAILED).tolist()
        for row in failed[:3]:
            log.warning("%s: item %s failed: %s", self.name, self.source.item_ids[row], self.errors.get(row))
        if self._record.get("truncated_texts"):
            log.warning("%s: %d texts were truncated to max_length", self.name, self._record["truncated_texts"])
        versions_of_rows = self._versions.rows()
        if mixed := self._versions.several():
            rows = ", ".join(f"{name} ({versions_of_rows[name]:,} items)" for name in mixed)
            log.warning("%s: the outputs come from different library versions: %s", self.name, rows)
        return {
            "items": len(self.status),
            "counts": {state: int((self.status == state).sum()) for state in (OK, MISSING, FAILED)},
            "failures": [
                {"item_id": self.source.item_ids[row], "reason": self.errors.get(row, "")}
                for row in failed[:FAILURES_RECORDED]
            ],
            "library_versions": versions_of_rows,
            **self._record,
        }


def _counts(status: np.ndarray) -> dict[str, int]:
    counts = {state: int((status == state).sum()) for state in (OK, MISSING, FAILED)}
    return {state: count for state, count in counts.items() if count}
