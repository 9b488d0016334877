"""What the extract and caption stages share: from a stage's call to finished shards, provenance and the record."""

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
from cm3.common.errors import UserError
from cm3.common.keys import key_of
from cm3.common.progress import Progress
from cm3.common.tables import FAILED, MISSING, OK
from extractors.extractor import Model
from extractors.registry import parse_extractor
from extractors.runtime.cache import Distinct, Kept
from extractors.runtime.shards import Shards, notes_of, with_notes
from extractors.runtime.source import Source, require_some
from extractors.spec import BackendSpec

log = logging.getLogger(__name__)

FAILURES_TOLD = 20
# They write files or run jobs, and have no part in what a model answers.
_NOT_OF_MODELS = {"pyarrow", "snakemake"}


def spec_of(call: Call) -> tuple[str, BackendSpec]:
    """Return the extractor's name and spec from a stage's --spec and --runtime.

    Raises:
        UserError: what the plan says that the model is (`identity`) is not what is on this machine.
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
                "the model changed in between, run the same command again"
            )
    return name, spec


class Job:
    """One extractor over all items of a data set, in shards, its model loaded once and only if there is work.

    What an earlier job of the same model, settings, code and libraries made of an input is taken from `Kept`, and of
    several equal inputs one is encoded for all. Without a digest of the code nothing is kept.

    Attributes:
        source: the items' inputs.
        status, errors: by row, filled in while `tables` runs.
    """

    def __init__(
        self, spec: BackendSpec, inputs: Mapping[str, Path], output: Path, name: str, code: str, threads: int | None
    ) -> None:
        self.spec, self.name, self.code, self.threads = spec, name, code, threads
        self.source: Source[Any] = spec.read(inputs)
        require_some(self.source, name, spec.modality)
        self.identity = spec.identity()
        libraries = {
            library: version for library, version in versions(spec.libraries).items() if library not in _NOT_OF_MODELS
        }
        address = key_of([self.identity, code, libraries])
        self._find_work(output, address)
        leftovers = list(self.shards.leftovers())
        for folder, same in leftovers:
            # Of a job that was killed before its inputs changed: what it has finished still holds for those that didn't.
            self.kept.adopt(folder) if same else shutil.rmtree(folder)
        if leftovers:
            self._find_work(output, address)
        self.status, self.errors = self.source.status.copy(), dict(self.source.errors)
        self._model: Model[Any] | None = None
        self._facts: dict[str, Any] = {}
        self._record: dict[str, Any] = {}

    def _find_work(self, output: Path, address: str) -> None:
        """Settle which rows' outputs are kept, and which inputs are to be encoded in which shards."""
        self.kept = Kept(output, address if self.code and self.spec.cached else None)
        rows = self.source.rows
        places = self.kept.find(self.source.digests)[rows]
        self._there, self._places = rows[places >= 0], places[places >= 0]
        self.work = Distinct(rows[places < 0], self.source.digests)
        inputs = hashlib.sha256(b"".join(self.work.digests.to_pylist())).hexdigest()
        self.shards = Shards(output, address, [inputs, self.spec.items_per_shard()])

    def tables(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (rows, table) per file of kept outputs, then per shard; the table has output, status and error.

        Raises:
            UserError: the model is not to be had, its output is not to be kept, or not one input came through.
        """
        rows = self.work.rows
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
                notes = {"facts": self._model.facts(), "device": self._model.device, "counts": result.counts}
                return with_notes(pa.table(columns), notes)

            without_input = self.status != OK
            progress.advance(int(without_input.sum()), **_counts(self.status[without_input]))
            for some, table in self.kept.tables(self._there, self._places):
                notes = notes_of(table)
                progress.advance(len(some), ok=len(some))
                yield some, table
            for part, table, before in self.shards.run(rows, self.spec.items_per_shard(), work):
                notes = notes_of(table)
                counts = {key: counts.get(key, 0) + count for key, count in notes["counts"].items()}
                same, groups = self.work.members(done, done + len(part))
                done += len(part)
                table = table.take(pa.array(groups))
                self.status[same] = table.column("status").to_pylist()
                told = zip(same.tolist(), table.column("error").to_pylist(), strict=True)
                self.errors |= {row: error for row, error in told if error}
                # The model has told of those that it has worked on.
                silent = same if before else np.setdiff1d(same, part)
                progress.advance(len(silent), **_counts(self.status[silent]))
                repeated += 0 if before else len(silent)
                yield same, table
        if not (self.status == OK).any():
            # Nothing in them is worth keeping, and with them the same command would end here without another try.
            self.shards.discard()
            reason = next(iter(self.errors.values()), "unknown")
            total = len(self.source.rows)
            raise UserError(f"{self.name}: not one of {total} inputs came through, first reason: {reason}")
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
        # Threads that spin while they wait take the processors from other jobs: on shared cores this costs a factor
        # of 2 to 4. It works only before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Libraries log each file that they open; a user wants the lines of this project.
        logging.disable(logging.INFO)
        try:
            self.spec.warn_of_effort(items)
            model = self.spec.load()
        finally:
            logging.disable(logging.NOTSET)
        torch = sys.modules.get("torch")
        if torch is not None and self.threads:
            torch.set_num_threads(self.threads)
        return model

    def provenance(self) -> dict[str, Any]:
        """Return where the output comes from; nothing in it depends on when or how fast it was made."""
        return {
            "extractor": self.name,
            "spec": self.spec.settings(),
            "identity": self.identity,
            "dtype": self.spec.dtype,
            **self._facts,
            "versions": versions(self.spec.libraries),
            "code": self.code,
        }

    def finish(self) -> dict[str, Any]:
        """Keep what the shards hold, for the output is written, and return the record: counts, first failures, speed.

        Of the record, kept + encoded + repeated are the items with an input: made before, shown to the model, and equal
        to one that was. What else the model counts, such as truncated texts, is of the encoded ones.
        """
        self.kept.adopt(self.shards.folder)
        self.kept.drop_others()
        without = len(self.status) - len(self.source.rows)
        log.info(
            "%s: %s items: %s kept, %s encoded%s%s",
            self.name,
            *(f"{count:,}" for count in (len(self.status), self._record["kept"], self._record["encoded"])),
            f", {self._record['repeated']:,} equal to one of these" if self._record["repeated"] else "",
            f", {without:,} without input" if without else "",
        )
        failed = np.flatnonzero(self.status == FAILED).tolist()
        for row in failed[:3]:
            log.warning("%s: item %s failed: %s", self.name, self.source.item_ids[row], self.errors.get(row))
        if self._record.get("truncated_texts"):
            log.warning("%s: %d texts were longer than the model reads", self.name, self._record["truncated_texts"])
        return {
            "items": len(self.status),
            "counts": {state: int((self.status == state).sum()) for state in (OK, MISSING, FAILED)},
            "failures": [
                {"item_id": self.source.item_ids[row], "reason": self.errors.get(row, "")}
                for row in failed[:FAILURES_TOLD]
            ],
            **self._record,
        }


def _counts(status: np.ndarray) -> dict[str, int]:
    counts = {state: int((status == state).sum()) for state in (OK, MISSING, FAILED)}
    return {state: count for state, count in counts.items() if count}
