"""Plain transformers encoders of text, with small random models saved by the test."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
from fixtures_extractors import CountingTokenizer, write_items

import extractors
from cm3.common.errors import UserError
from cm3.common.features import read_features
from cm3.common.tables import read_metadata
from extractors.extract import extract
from extractors.text.pooling import TokenPooling, pool
from extractors.text.transformers import TransformersTextExtractor

TEXTS = ["red shoe", "the long long word for women", "a", "blue bag : pan", "shoe " * 200]
KINDS = list(tiny_transformers.text_models())
POOLINGS: tuple[TokenPooling, ...] = ("mean", "cls", "last", "max")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by kind; their tokenizers pad on either side."""
    sides = dict(zip(KINDS, ["right", "left"] * len(KINDS), strict=False))
    return {kind: tiny_transformers.save_text(kind, tmp_path_factory.mktemp(kind), sides[kind]) for kind in KINDS}


def load(folder: Path, **more: Any) -> TransformersTextExtractor:
    spec = {"modality": "text", "backend": "transformers-text", "weights": str(folder), "device": "cpu"}
    loaded = extractors.load(spec | more)
    assert isinstance(loaded, TransformersTextExtractor)
    return loaded


def bare(folder: Path, text: str, pooling: str, limit: int) -> np.ndarray:
    """Return a text's vector by the library alone: one text, no padding."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    if len(tokens) > limit:
        tokens = tokens[: limit - 1] + tokens[-1:]
    model = AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([tokens])).last_hidden_state[0].numpy()
    pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1], "max": states.max(0)}[pooling]
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_the_library_itself_in_any_batch(
    folders: dict[str, Path], kind: str, pooling: str
) -> None:
    extractor = load(folders[kind], pooling=pooling)
    expected = np.stack([bare(folders[kind], text, pooling, extractor.limit) for text in TEXTS])
    together = extractor.run(TEXTS)
    np.testing.assert_allclose(together.embedding, expected, atol=1e-5)
    assert together.counts == {"truncated_texts": 1}
    for size in (1, 3):
        extractor.tokens.size = size * 16
        np.testing.assert_allclose(extractor.run(TEXTS[::-1]).embedding[::-1], expected, atol=1e-5)


def test_the_limit_is_what_tokenizer_and_positions_allow(folders: dict[str, Path]) -> None:
    assert [load(folders[kind]).limit for kind in ("bert", "roberta", "qwen", "t5")] == [48, 40, 64, 64]
    assert load(folders["bert"], max_length=5).run(TEXTS).counts == {"truncated_texts": 3}
    with pytest.raises(UserError, match="max_length = 41: the model has positions for 40 tokens"):
        load(folders["roberta"], max_length=41)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_count(side: str) -> None:
    states = torch.arange(24.0).reshape(2, 4, 3) - 40
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    states[1, mask[1] == 0] = float("nan")
    there = states[1, mask[1] == 1]
    expected = {"mean": there.mean(0), "cls": there[0], "last": there[-1], "max": there.amax(0)}
    for pooling in POOLINGS:
        assert torch.equal(pool(states, mask, pooling)[1], expected[pooling])


def test_prompt_length_dimensions_and_norm_reach_the_vectors(folders: dict[str, Path]) -> None:
    whole = load(folders["bert"], normalise=False)
    prompted = load(folders["bert"], normalise=False, prompt="query : ")
    np.testing.assert_allclose(
        prompted.run(["red shoe"]).embedding, whole.run(["query : red shoe"]).embedding, atol=1e-6
    )
    cut = load(folders["bert"], truncate_dim=8).run(TEXTS).embedding
    parts = whole.run(TEXTS).embedding[:, :8]
    np.testing.assert_allclose(cut, parts / np.linalg.norm(parts, axis=1, keepdims=True), atol=1e-5)
    facts = prompted.facts()
    assert facts["prompt"] == "query : " and facts["pooling"] == "mean" and facts["model"] == "BertModel"
    with pytest.raises(UserError, match="truncate_dim = 33: the model's vectors have 32 dimensions"):
        load(folders["bert"], truncate_dim=33)


def test_texts_of_every_kind_have_a_status(folders: dict[str, Path]) -> None:
    titles = ["", " \n\t\u3000", "\ud800", "shoe " * 20_000, "red\x00shoe", "🙂 نعم", None, "red shoe"]
    found = load(folders["bert"]).encode([{"title": title} for title in titles])
    ok = ["missing", "missing", "ok", "ok", "ok", "ok", "missing", "ok"]
    assert found.status.tolist() == ok and found.counts == {"truncated_texts": 1}
    assert np.isfinite(found.embedding).all() and not found.embedding[[0, 1, 6]].any()


def test_texts_without_a_token_fail_and_take_no_other_along(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(folders["bert"], tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "m")
    extractor = load(tmp_path / "m")
    # What is blank to a tokenizer need not be so to Python; here two spaces stand for it.
    found = extractor.run(["red", "  ", "shoe"])
    assert found.status.tolist() == ["ok", "failed", "ok"] and "no token" in found.errors[1]
    np.testing.assert_allclose(found.embedding[[0, 2]], extractor.run(["red", "shoe"]).embedding, atol=1e-6)


def test_any_batch_and_shard_size_gives_the_same_file(folders: dict[str, Path], tmp_path: Path) -> None:
    items = write_items(tmp_path, [{"title": f"{copy} {text}"} for copy in "abc" for text in TEXTS] + [{}])
    found = []
    for number, runtime in enumerate([{}, {}, {"shard_size": 4}, {"batch_size": 1, "shard_size": 7}]):
        data = {"modality": "text", "backend": "transformers-text", "weights": str(folders["qwen"]), "device": "cpu"}
        spec = extractors.parse_extractor("tiny", data | runtime, "extractors.tiny")
        record = extract(spec, {"items": items}, tmp_path / f"{number}.parquet")
        assert record["truncated_texts"] == 3 and record["counts"] == {"ok": 15, "missing": 1, "failed": 0}
        found.append(read_features(tmp_path / f"{number}.parquet").embedding)
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()
    for embedding in found[2:]:
        np.testing.assert_allclose(embedding, found[0], atol=1e-5)
    stored = read_metadata(tmp_path / "2.parquet")
    assert stored["pooling"] == "mean" and stored["max_length"] == 64 and "transformers" in stored["versions"]


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_lower_precisions_are_close_and_have_other_keys(folders: dict[str, Path], precision: str) -> None:
    full = load(folders["bert"])
    low = load(folders["bert"], precision=precision)
    assert full.spec.identity() != low.spec.identity()
    weights = {weight.dtype for weight in low.model.parameters()}
    assert weights == {torch.float32 if precision == "autocast" else torch.bfloat16}
    cosine = (full.run(TEXTS).embedding * low.run(TEXTS).embedding).sum(1)
    assert (cosine > 0.99).all() and not np.array_equal(full.run(TEXTS).embedding, low.run(TEXTS).embedding)


def test_what_is_no_text_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_transformers.save_vision("clip", tmp_path / "clip")
    tiny_transformers.tokenizer().save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match=r"not a text encoder \(CLIPModel\)"):
        load(tmp_path / "clip")
    shutil.copytree(folders["gpt2"], tmp_path / "other")
    shutil.copy(folders["bert"] / "config.json", tmp_path / "other" / "config.json")
    with pytest.raises(UserError, match=r"\d+ tensors of BertModel, .* is not in the checkpoint"):
        load(tmp_path / "other")
    config = (folders["bert"] / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 16')
    shutil.copytree(folders["bert"], tmp_path / "narrow")
    (tmp_path / "narrow" / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"in the checkpoint instead of"):
        load(tmp_path / "narrow")


def test_a_checkpoint_without_the_unused_pooler_is_fine(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["bert"], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    expected = load(folders["bert"]).run(TEXTS).embedding
    assert np.array_equal(load(tmp_path / "m").run(TEXTS).embedding, expected)


def test_nan_names_the_items(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["bert"], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    word = tiny_transformers.tokenizer().convert_tokens_to_ids("pan")
    weights["embeddings.word_embeddings.weight"][word] = float("nan")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    items = [{"item_id": f"i{row}", "title": text} for row, text in enumerate(TEXTS)]
    with pytest.raises(UserError, match="1 vectors hold NaN or infinity, first of items i3;"):
        load(tmp_path / "m").encode(items)


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_tokenised_once_and_the_vectors_are_the_same(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = load(folders[kind], prompt="a ", batch_size=2)
    extractor.token_ids.tokenizer = counting = CountingTokenizer(extractor.tokenizer)
    once = extractor.run(TEXTS)
    assert len(counting.seen) == len(TEXTS) and set(counting.seen.values()) == {1}
    assert once.counts == {"truncated_texts": 1}
    monkeypatch.setattr(extractor, "counted", lambda texts: [len(ids) for ids in counting(texts)["input_ids"]])
    twice = extractor.run(TEXTS)
    assert max(counting.seen.values()) > 2 and np.array_equal(once.embedding, twice.embedding)
    assert twice.counts == once.counts
