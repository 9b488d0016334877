"""Words without a trained model: TF-IDF weights of the terms of the texts, reduced by a truncated SVD (LSA)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from extractors.extractor import Advance, Encoded, Extractor, collect, silent
from extractors.runtime.source import Source
from extractors.spec import BackendSpec, Cost
from extractors.text import item_text

log = logging.getLogger("extractors.tfidf")

_ANALYZERS = {"words": "word", "characters": "char_wb"}


class TfidfSpec(BackendSpec):
    """TF-IDF weights of words or character n-grams, reduced by a truncated SVD (latent semantic analysis).

    The frequencies are those of the data set's own items: there is one shard, and a new item changes all vectors.
    """

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "scipy", "scikit-learn")
    shard_items: ClassVar[int | None] = None
    cached: ClassVar[bool] = False
    cost: ClassVar[Cost] = Cost(1500, 0, 500, bytes_per_item=40_000)
    modalities: ClassVar[tuple[str, ...]] = ("words", "text")

    modality: Literal["words", "text"] = Field(description="words, or text where no other extractor of texts is used.")
    backend: Literal["tfidf"] = Field(description="Weigh the terms of the texts by TF-IDF; no weights, no GPU.")
    fields: list[item_text.Field] = Field(
        list(item_text.FIELDS), min_length=1, description="Item fields that the text is made of, in this order."
    )
    terms: Literal["words", "characters"] = Field(
        "words", description="What is counted: words, or n-grams of characters inside words."
    )
    ngrams: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Shortest and longest n-gram; default: [1, 1] of words, [3, 5] of characters.",
    )
    min_items: int = Field(2, gt=0, description="A term counts if at least so many different texts contain it.")
    max_terms: int = Field(100_000, gt=0, description="Number of terms; beyond it the most frequent ones count.")
    dim: int = Field(512, gt=0, description="Dimensions of the vectors; fewer where the texts span fewer.")

    @field_validator("ngrams")
    @classmethod
    def _ngrams_are_a_range(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("give the shortest and the longest n-gram, such as [1, 2]")
        return value

    @model_validator(mode="after")
    def _fields_once_in_one_shard(self) -> "TfidfSpec":
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"duplicate field in fields: {self.fields}")
        if self.shard_size is not None:
            raise ValueError("shard_size: the frequencies of terms are those of all items, in one shard; remove it")
        return self

    def ngram_range(self) -> tuple[int, int]:
        """Return the shortest and the longest n-gram."""
        first, last = self.ngrams or ((1, 1) if self.terms == "words" else (3, 5))
        return first, last

    def uses_gpu(self) -> bool:
        """Return False: there is no model."""
        return False

    def read(self, inputs: Mapping[str, Path]) -> Source[str]:
        """Return the captions if the job has captions as input, else the texts of the items."""
        if "captions" in inputs:
            return item_text.read_captions(inputs["items"], inputs["captions"])
        return item_text.read_texts(inputs["items"], self.fields)

    def load(self) -> "TfidfExtractor":
        """Return the extractor, which knows no terms yet."""
        return TfidfExtractor(self)


class TfidfExtractor(Extractor[str]):
    """Vectors of texts by the frequencies of their terms, of unit length.

    A term's weight is (1 + log of its count in the text) * (1 + log((1 + N) / (1 + n))), n of the N texts having the term;
    the weights of a text have unit length. The vectors are its coordinates on the first right singular vectors of all
    texts' weights, scaled to unit length (S. Deerwester et al., "Indexing by latent semantic analysis", 1990).
    """

    def __init__(self, spec: TfidfSpec) -> None:
        self.spec = spec
        self.dim = spec.dim
        self._weights: Any = None
        self._axes: np.ndarray | None = None

    def input_of(self, item: Mapping[str, Any]) -> str | None:
        """Return the item's text, made of the spec's fields."""
        return item_text.item_text(item, self.spec.fields)

    def fit(self, texts: Iterable[str]) -> "TfidfExtractor":
        """Learn the terms, their frequencies and the singular vectors from N texts; return this extractor.

        Equal texts count once. The result is the same for any number of threads.

        Raises:
            UserError: no term occurs in `min_items` texts.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.utils.extmath import randomized_svd
        from threadpoolctl import threadpool_limits

        spec = self.spec
        distinct = list(dict.fromkeys(texts))
        self._weights = TfidfVectorizer(
            analyzer=_ANALYZERS[spec.terms],
            ngram_range=spec.ngram_range(),
            min_df=spec.min_items,
            max_features=spec.max_terms,
            sublinear_tf=True,
            dtype=np.float64,
        )
        try:
            matrix = self._weights.fit_transform(distinct)
        except ValueError as error:  # no term is left, or there are fewer texts than min_items
            raise UserError(
                f"none of {len(distinct)} different texts has a term that occurs in {spec.min_items} of them; lower min_items"
            ) from error
        # Sums of several threads differ in their last digits.
        with threadpool_limits(1):
            _, values, axes = randomized_svd(matrix, min(spec.dim, *matrix.shape), random_state=0, n_iter=5)
        kept = values > values[0] * 1e-6  # the others are rounding
        self._axes = axes[kept].T
        self.dim = int(kept.sum())
        explained = float(np.square(values).sum() / matrix.multiply(matrix).sum())
        log.info(
            "%d terms of %d texts, %d dimensions hold %.0f %% of the squares",
            *matrix.shape[::-1],
            self.dim,
            100 * explained,
        )
        return self

    def run(self, inputs: Iterable[str], advance: Advance = silent) -> Encoded:
        """Return the vectors of the texts, with the terms of `fit`, or where it was not called, of these texts.

        A text without any known term is failed.

        Raises:
            UserError: as `fit`.
        """
        texts = list(inputs)
        if self._axes is None:
            self.fit(texts)
        found = self._vectors(texts)
        errors = {row: "the text has no term that other items have" for row in range(len(texts)) if row not in found}
        advance(len(texts), ok=len(found), failed=len(errors))
        return collect(found, errors, len(texts), self.dim)

    def _vectors(self, texts: Sequence[str]) -> dict[int, np.ndarray]:
        vectors = self._weights.transform(texts) @ self._axes
        lengths = np.linalg.norm(vectors, axis=1)
        unit = np.divide(vectors, lengths[:, None], out=np.zeros_like(vectors), where=lengths[:, None] > 1e-9)
        return {int(row): unit[row].astype(np.float32) for row in np.flatnonzero(lengths > 1e-9)}

    def facts(self) -> dict[str, Any]:
        """Return the number of terms and what is counted."""
        terms = 0 if self._weights is None else len(self._weights.vocabulary_)
        return {"terms": terms, "counted": self.spec.terms, "ngrams": list(self.spec.ngram_range())}
