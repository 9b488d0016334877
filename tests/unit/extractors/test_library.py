"""The extractors as a library of their own: the documented examples, and what every new backend gets for free."""

import doctest
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from fixtures_extractors import write_items
from pydantic import Field
from repository import ROOT

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from extractors import registry
from extractors.extract import extract
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.runtime.source import Source
from extractors.spec import BackendSpec
from extractors.text.item_text import item_text, read_texts

DOCS = ROOT / "docs" / "extractors.md"


def test_the_example_in_the_package_runs() -> None:
    result = doctest.testmod(extractors)
    assert result.attempted > 5 and result.failed == 0


def test_the_documented_use_works() -> None:
    section = DOCS.read_text().partition("## As a library")[2].partition("\n## ")[0]
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(code, "docs", "exec"), names)
    assert names["encoded"].embedding.shape == (2, 384) and names["encoded"].status.tolist() == ["ok", "missing"]
    assert names["new"].embedding.shape == (1, 2) and names["new"].status.tolist() == ["ok"]


class LettersSpec(BackendSpec):
    """A backend of this test: letters counted, and faults on demand."""

    modalities: ClassVar[tuple[str, ...]] = ("text",)
    modality: Literal["text"]
    backend: Literal["letters"]
    fault: str | None = Field(None)

    def read(self, inputs: Mapping[str, Path]) -> Source[str]:
        return read_texts(inputs["items"], ["title"])

    def load(self) -> "Letters":
        return Letters(self)


class Letters(Extractor[str]):
    """Counts of a and b; with a fault, what no model should do."""

    def __init__(self, spec: LettersSpec) -> None:
        self.spec, self.dim, self.calls = spec, 2, 0

    def input_of(self, item: Mapping[str, Any]) -> str | None:
        return item_text(item, ["title"])

    def facts(self) -> dict[str, Any]:
        return {}

    def run(self, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        texts = list(inputs)
        self.calls += 1
        width = self.dim + (self.calls > 1) * (self.spec.fault == "grows")
        found = {row: np.resize([text.count("a"), text.count("b")], width) for row, text in enumerate(texts)}
        if self.spec.fault == "grows inside":
            found[0] = np.zeros(3)
        return collect(found, {}, len(texts), width)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(registry.BACKENDS, "letters", f"{__name__}:LettersSpec")
    return {"modality": "text", "backend": "letters"}


def test_shard_size_changes_how_often_a_job_stores_and_nothing_else(tmp_path: Path, letters: dict[str, Any]) -> None:
    items = write_items(tmp_path, [{"title": "ab" * row} for row in range(9)])
    specs = [extractors.parse_extractor("l", letters | {"shard_size": size}, "l") for size in (None, 1, 4)]
    assert [spec.items_per_shard() for spec in specs] == [2048, 1, 4]
    assert len({str(spec.identity()) for spec in specs}) == 1 and specs[2].runtime()["shard_size"] == 4
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for spec, path in zip(specs, files, strict=True):
        extract(spec, {"items": items}, path, name="l")
    assert len({path.read_bytes() for path in files}) == 1
    assert read_features(files[0]).embedding[:, 0].tolist() == list(range(9))


def test_a_job_with_another_shard_size_takes_none_of_the_old_shards(
    tmp_path: Path, letters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path, [{"title": "ab" * row} for row in range(1, 9)])
    run, broken = Letters.run, iter([False, False, True])

    def breaks(self: Letters, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        if next(broken, False):
            raise OSError("the disk went away")
        return run(self, inputs, advance)

    monkeypatch.setattr(Letters, "run", breaks)
    path = tmp_path / "f.parquet"
    with pytest.raises(OSError, match="went away"):
        extract(extractors.parse_extractor("l", letters | {"shard_size": 2}, "l"), {"items": items}, path)
    assert len(list(tmp_path.glob(".f.parquet.shards-*/*.parquet"))) == 2
    calls: list[int] = []
    monkeypatch.setattr(Letters, "run", lambda self, *arguments: (calls.append(1), run(self, *arguments))[1])
    extract(extractors.parse_extractor("l", letters | {"shard_size": 3}, "l"), {"items": items}, path)
    assert len(calls) == 3 and read_features(path).embedding[:, 0].tolist() == list(range(1, 9))
    assert not list(tmp_path.glob(".f.parquet.shards-*"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("grows", "l: the model made vectors of 2 dimensions, then of 3"),
        ("grows inside", "the model made vectors of 2 dimensions, then one of 3"),
    ],
)
def test_vectors_of_varying_length_are_refused(
    tmp_path: Path, letters: dict[str, Any], fault: str, message: str
) -> None:
    items = write_items(tmp_path, [{"title": "ab" * row} for row in range(1, 5)])
    spec = extractors.parse_extractor("l", letters | {"fault": fault, "shard_size": 2}, "l")
    with pytest.raises(UserError, match=message):
        extract(spec, {"items": items}, tmp_path / "f.parquet", name="l")
    assert not (tmp_path / "f.parquet").exists()
