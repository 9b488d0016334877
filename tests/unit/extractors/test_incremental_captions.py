"""Data that grew: only new images are captioned, and only new captions are encoded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from caption_server import MODEL, completion, error, serving, short_pauses, spec_of
from fixtures_extractors import plain
from growing_shop import bert, run, shop, shown, texts_of, vectors  # noqa: F401

from cm3.common.tables import CAPTIONS, read_metadata, read_table
from extractors.caption.stage import caption

__all__ = ["short_pauses"]  # used by every test here


COLOURS = ["red", "blue", "green", "yellow"]


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Callable[..., dict[str, Path]]]:
    """Tables of items with a title and an image of one colour each."""

    def make(count: int, titles: Any = None, folder: Path = tmp_path) -> dict[str, Path]:
        images = {f"i{n}": plain(COLOURS[n % 4], (40, 30)) for n in range(count)}
        named = {f"i{n}": f"thing {n}" for n in range(count)} | (titles or {})
        return shop(folder, list(images), named, images)

    yield make


def test_only_new_images_are_captioned_and_failed_ones_are_asked_again(
    tmp_path: Path, few: Callable[..., dict[str, Path]]
) -> None:
    output = tmp_path / "c.parquet"
    with serving(lambda asked: error(400, "no") if asked.prompt.startswith("thing 3 ") else None) as server:
        record = caption(spec_of(server.url), few(20), output, name="teller", code="a")
    assert record["counts"] == {"ok": 19, "missing": 0, "failed": 1}
    for titles, expected in (
        (None, ["thing 20 What is it?", "thing 21 What is it?", "thing 3 What is it?"]),
        ({"i5": "mug"}, ["mug What is it?"]),
        (None, []),
    ):
        output.unlink()
        with serving(lambda asked: completion(f"a {asked.colour} product", model="newer")) as server:
            record = caption(spec_of(server.url), few(22, titles), output, name="teller", code="a")
        assert sorted(asked.prompt for asked in server.asked) == expected
        assert record["encoded"] == len(expected) and record["kept"] == 22 - len(expected)
        table = read_table(output, CAPTIONS).to_pydict()
        assert table["caption"] == [f"a {COLOURS[n % 4]} product" for n in range(22)]
        assert read_metadata(output)["answered_by"]["models"] == sorted([MODEL, "newer"])


def test_a_caption_of_the_same_words_is_not_encoded_again(
    tmp_path: Path, bert: Path, few: Callable[..., dict[str, Path]], shown: list[Any]
) -> None:
    counts = []
    for number, titles in ((20, None), (22, {"i5": "mug"})):
        inputs = few(number, titles)
        with serving() as server:
            caption(spec_of(server.url), inputs, tmp_path / "c.parquet", name="teller", code="a")
        inputs = {"items": inputs["items"], "captions": tmp_path / "c.parquet"}
        record, features = run(texts_of(bert), inputs, tmp_path / "f.parquet")
        counts.append((record["kept"], record["encoded"], record["repeated"]))
        assert 1 < len(set(vectors(features).values())) <= 4  # the small model does not know every colour
    assert counts == [(0, 4, 16), (22, 0, 0)]
