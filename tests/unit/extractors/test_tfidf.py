"""TF-IDF of words and of character n-grams, reduced by a truncated SVD."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import write_items
from threadpoolctl import threadpool_limits

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from extractors.extract import extract
from extractors.text.tfidf import TfidfExtractor

TFIDF = {"modality": "words", "backend": "tfidf", "fields": ["title"]}
TITLES = ["red shoe red", "red bag", "blue shoe", "blue bag bag", "green shoe bag"]


def loaded(**settings: Any) -> TfidfExtractor:
    extractor = extractors.load(TFIDF | settings)
    assert isinstance(extractor, TfidfExtractor)
    return extractor


def items(titles: list[str | None]) -> list[dict[str, Any]]:
    return [{"item_id": f"i{row}", "title": title} for row, title in enumerate(titles)]


def weights_by_hand(titles: list[str], least: int) -> np.ndarray:
    counts = [Counter(title.split()) for title in titles]
    frequency = Counter(term for one in counts for term in one)
    terms = sorted(term for term, number in frequency.items() if number >= least)
    rows = [
        [
            (1 + math.log(one[t])) * (1 + math.log((1 + len(titles)) / (1 + frequency[t]))) if t in one else 0
            for t in terms
        ]
        for one in counts
    ]
    return np.array([np.array(row) / np.linalg.norm(row) for row in rows])


def test_all_dimensions_keep_the_cosines_of_the_weights():
    encoded = loaded().encode(items(TITLES))
    expected = weights_by_hand(TITLES, least=2)  # green is in one text only
    assert encoded.embedding.shape == (5, 4) and encoded.embedding.dtype == np.float32
    np.testing.assert_allclose(encoded.embedding @ encoded.embedding.T, expected @ expected.T, atol=1e-6)


def test_fewer_dimensions_are_those_of_a_singular_value_decomposition():
    encoded = loaded(dim=2, min_items=1).encode(items(TITLES))
    left, values, _ = np.linalg.svd(weights_by_hand(TITLES, least=1))
    expected = left[:, :2] * values[:2]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoded.embedding @ encoded.embedding.T, expected @ expected.T, atol=1e-6)


def test_items_without_text_are_missing_and_those_without_a_shared_term_failed():
    encoded = loaded().encode(items([*TITLES, None, "unheard of"]))
    assert encoded.status.tolist() == ["ok"] * 5 + ["missing", "failed"]
    assert encoded.errors == {6: "the text has no term that other items have"}
    assert not encoded.embedding[5:].any()
    np.testing.assert_allclose(np.linalg.norm(encoded.embedding[:5], axis=1), 1, rtol=1e-6)


def test_new_items_are_placed_among_those_that_were_fitted():
    whole = loaded().encode(items(TITLES))
    extractor = loaded().fit(TITLES)
    apart = extractor.encode(items(["a red bag", "unknown"]))
    np.testing.assert_allclose(apart.embedding[0], whole.embedding[1], atol=1e-6)
    assert apart.status.tolist() == ["ok", "failed"] and extractor.dim == whole.embedding.shape[1]


def test_parts_of_words_match_where_words_do_not():
    titles = ["snowboards", "snowboarding jacket", "teapot", "teapots"]
    cosines = loaded(terms="characters").encode(items(titles)).embedding
    assert cosines[0] @ cosines[1] > 0.3 and cosines[2] @ cosines[3] > 0.5
    assert abs(cosines[0] @ cosines[2]) < 1e-6


def test_pairs_of_words_count_with_ngrams():
    assert loaded(ngrams=[1, 2], min_items=1).encode(items(["a big red bag", "a big bag"])).embedding.shape == (2, 2)
    extractor = loaded(ngrams=[2, 2], min_items=1).fit(["big red bag"])
    assert extractor.facts() == {"terms": 2, "counted": "words", "ngrams": [2, 2]}


def test_vectors_do_not_depend_on_the_number_of_threads():
    chance = np.random.default_rng(0)
    titles = [" ".join(f"w{n}" for n in chance.zipf(1.3, 12) % 3000) for _ in range(1500)]
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(loaded(dim=64).encode(items(titles)).embedding)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("titles", "least"), [(["red", "blue", "green"], 2), (["!", "?"], 1), (["red bag", "red shoe"], 3), (["red"], 2)]
)
def test_texts_that_share_no_term_are_an_error(titles: list[str], least: int):
    with pytest.raises(UserError, match=rf"of {len(titles)} different .* occurs in {least} of them; lower min_items"):
        loaded(min_items=least).encode(items(titles))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ngrams": [2, 1]}, "shortest and the longest"),
        ({"ngrams": [0, 1]}, "shortest and the longest"),
        ({"shard_size": 10}, "in one shard; remove it"),
        ({"fields": ["title", "title"]}, "duplicate field"),
        ({"modality": "image"}, "Input should be 'words' or 'text'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        loaded(**settings)


def test_a_new_item_changes_the_file_as_a_whole(tmp_path: Path):
    spec = extractors.parse_extractor("tfidf", TFIDF, "tfidf")
    tables = {}
    for name, titles in (("all", TITLES), ("first", TITLES[:4])):
        (tmp_path / name).mkdir()
        inputs = {"items": write_items(tmp_path / name, [{"title": title} for title in titles])}
        record = extract(spec, inputs, tmp_path / "f.parquet", code="extract 1, tfidf 1")
        assert record["kept"] == 0 and record["encoded"] == len(titles)
        tables[name] = read_features(tmp_path / "f.parquet")
    for name, titles in (("all", TITLES), ("first", TITLES[:4])):
        alone = loaded().encode(items([str(title) for title in titles]))
        np.testing.assert_array_equal(tables[name].embedding, alone.embedding)
