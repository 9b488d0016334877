"""Token ids that are kept from the count of tokens to the batch, padded as the tokenizer itself would."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
import transformers
from fixtures_extractors import CountingTokenizer

from extractors.runtime.batch import Batch
from extractors.runtime.slabs import Download
from extractors.text.base import TextModel
from extractors.text.tokens import TokenIds

TEXTS = ["red", "red shoe for women", "a", "red shoe"]
TOKENIZERS = {
    "right": lambda: tiny_transformers.tokenizer("right"),
    "left": lambda: tiny_transformers.tokenizer("left"),
    "python": transformers.ByT5Tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("counted", [True, False])
def test_batches_are_those_of_the_tokenizer(name: str, counted: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = TokenIds(tokenizer, 5)
    if counted:
        lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
        assert tokens.count(TEXTS) == [min(length, 6) for length in lengths] and max(lengths) > 5
    expected = tokenizer(TEXTS, padding=True, truncation=True, max_length=5, return_tensors="pt")
    ids, mask = tokens.batch(TEXTS)
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])
    assert ids.dtype == mask.dtype == torch.int64


def test_counted_texts_are_kept_until_they_are_cleared() -> None:
    counting: Any = CountingTokenizer(tiny_transformers.tokenizer())
    tokens = TokenIds(counting, 5)
    tokens.count(TEXTS[:3])
    tokens.batch(TEXTS)
    assert counting.seen == dict.fromkeys(TEXTS, 1)
    tokens.clear()
    tokens.batch(TEXTS)
    assert counting.seen == dict.fromkeys(TEXTS[:3], 2) | {TEXTS[3]: 2}


class Words(TextModel):
    """A model whose vectors are the numbers in texts; it logs what it does."""

    def __init__(self, device: str) -> None:
        self.device, self.prompt, self.limit, self.dim, self.tokens = device, "", 9, 1, Batch(2)
        self.events: list[str] = []

    def facts(self) -> dict[str, Any]:
        return {}

    def counted(self, texts: Sequence[str]) -> list[int]:
        return [1] * len(texts)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        self.events.append("forward")
        return torch.tensor([[float(text)] for text in texts])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vectors_arrive_a_batch_later_on_cuda(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Words(device)
    wait = Download.wait
    monkeypatch.setattr(Download, "wait", lambda one: (model.events.append("wait"), wait(one))[1])
    monkeypatch.setattr(Words, "spec", type("", (), {"reads_reviews": False}), raising=False)
    found = model.run([str(n) for n in range(6)])
    assert np.array_equal(found.embedding[:, 0], np.arange(6))
    later = ["forward", "forward", "wait", "forward", "wait", "wait"]
    assert model.events == (later if device == "cuda" else ["forward", "wait"] * 3)
