"""Models of sentence-transformers tokenise each text once, and give the vectors of the library to the bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
from fake_device import Launches, fake_device, moved
from fixtures_extractors import CountingTokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import extractors
from extractors.text.sentence_transformers import SentenceTransformersExtractor, library_vectors

TEXTS = ["red shoe", "the long long word for women", "a", "blue bag : pan", "shoe " * 200, "the red bag", "Ümlaut 🙂"]
KINDS = list(tiny_transformers.text_models())


def save(folder: Path, kind: str, pooling: str = "mean", route: bool = False, side: str = "right", **more: Any) -> Path:
    body = Transformer(str(tiny_transformers.save_text(kind, folder / "bare", side)), **more)
    pooled = Pooling(body.get_embedding_dimension(), pooling, include_prompt=False)
    modules = [body, pooled, Dense(pooled.get_embedding_dimension(), 16)]
    if route:
        modules = [Router({"query": [body], "document": [body]}, default_route="document"), *modules[1:]]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "m"), create_model_card=False)
    return folder / "m"


def load(folder: Path, **more: Any) -> SentenceTransformersExtractor:
    spec = {"modality": "text", "backend": "sentence-transformers", "weights": str(folder), "device": "cpu"}
    extractor = extractors.load(spec | more)
    assert isinstance(extractor, SentenceTransformersExtractor)
    return extractor


def by_library(extractor: SentenceTransformersExtractor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the extractor's vectors, each batch encoded by the library itself."""
    spec = extractor.spec

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return extractor.model.encode(
            [{"text": text} for text in texts] if extractor.marks_texts else list(texts),
            prompt=spec.prompt,
            batch_size=len(texts),
            normalize_embeddings=spec.normalise,
            truncate_dim=spec.truncate_dim,
            convert_to_tensor=True,
        ).float()

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "forward", encode)
        return extractor.run(TEXTS)


@pytest.mark.parametrize("settings", [{}, {"prompt": "query : ", "truncate_dim": 8, "normalise": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_tokenised_once_and_the_vectors_are_those_of_the_library(
    tmp_path: Path, kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = load(
        save(tmp_path, kind, side="left" if kind == "qwen" else "right"), batch_size=2, max_length=32, **settings
    )
    expected = by_library(extractor, monkeypatch)
    assert extractor.token_ids is not None
    extractor.token_ids.tokenizer = counting = CountingTokenizer(extractor.token_ids.tokenizer)
    found = extractor.run(TEXTS)
    assert len(counting.seen) == len(TEXTS) and set(counting.seen.values()) == {1}
    assert np.array_equal(found.embedding, expected.embedding) and found.counts == {"truncated_texts": 1}
    assert found.counts == expected.counts


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("route", [False, True])
def test_poolings_and_routes(tmp_path: Path, pooling: str, route: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load(save(tmp_path, "bert", pooling, route), prompt="the ")
    assert extractor.inputs is not None
    assert np.array_equal(extractor.run(TEXTS).embedding, by_library(extractor, monkeypatch).embedding)


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_inputs_that_the_library_makes_otherwise_are_left_to_it(
    tmp_path: Path, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = load(save(tmp_path, "bert", processing_kwargs={"text": {"padding": padding}}))
    assert (extractor.inputs is None) == (padding == "max_length")
    assert np.array_equal(extractor.run(TEXTS).embedding, by_library(extractor, monkeypatch).embedding)


@pytest.mark.parametrize("kind", ["qwen3-vl", "embeddinggemma2", "clip", "siglip"])
def test_multimodal_models_encode_texts_as_the_library_does(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = load(tiny_transformers.save_embedder(kind, tmp_path), max_length=None if kind == "qwen3-vl" else 8)
    assert (extractor.inputs is None) == (kind in ("qwen3-vl", "embeddinggemma2")), "which have a chat template"
    assert np.array_equal(extractor.run(TEXTS).embedding, by_library(extractor, monkeypatch).embedding)


@pytest.mark.parametrize("kind", ["bert", "qwen"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_batch_does_not_wait_for_the_device(tmp_path: Path, kind: str, pooling: str) -> None:
    extractor = load(save(tmp_path, kind, pooling))
    assert extractor.inputs is not None
    inputs = extractor.inputs.of(TEXTS)
    with fake_device():
        moved(extractor.model, "cuda")
        on_device = {name: moved(value, "cuda") for name, value in inputs.items()}
        with torch.inference_mode(), Launches("cuda"):
            vectors = library_vectors(extractor.model, on_device, extractor.spec)
        assert vectors.device.type == "cuda" and vectors.shape == (len(TEXTS), 16)
