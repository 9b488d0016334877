"""A graph brought up to date is the graph of a full search, to the byte, whatever came, went, changed or moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cm3.similarity.incremental as kept
from cm3.common.features import write_features
from cm3.similarity.exact import knn
from cm3.similarity.incremental import SPARE, keys_of, neighbours
from cm3.similarity.stage import similarity


def update(
    ids: list[str], x: np.ndarray, k: int, earlier: kept.NeighbourLists | None
) -> tuple[kept.NeighbourLists, int]:
    """Return updated lists, held against a search of all rows."""
    lists, searched = neighbours(keys_of(ids, x), torch.from_numpy(x), k, earlier)
    indices, scores = knn(torch.from_numpy(x), k)
    np.testing.assert_array_equal(lists.indices[:, :k], indices.numpy())
    np.testing.assert_array_equal(lists.scores[:, :k], scores.numpy())
    # What is stored beyond k must be right as well, for the next update builds on it.
    wide = min(len(x), k + SPARE)
    further = knn(torch.from_numpy(x), wide)[0].numpy()
    certain = lists.indices >= 0
    assert lists.indices.shape == (len(x), wide) and (lists.indices == further)[certain].all()
    assert not (np.diff(certain.astype(int), axis=1) > 0).any() and np.isneginf(lists.scores[~certain]).all()
    return lists, searched


def draw(case: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 12)).astype(np.float32)
    if case == "coarse":  # ties everywhere
        x = rng.integers(-1, 2, (n, 3)).astype(np.float32)
        x[~x.any(1)] = 1
    elif case == "placeholder":  # a third of all items have the same image
        x[rng.permutation(n)[: n // 3]] = x[0]
    return x


CASES = ["plain", "coarse", "placeholder"]


@pytest.mark.parametrize("case", CASES)
def test_a_tenth_more_rows_are_searched_and_no_other(case: str) -> None:
    x = draw(case, 660)
    ids = [f"i{row}" for row in range(660)]
    lists, searched = update(ids[:600], x[:600], 5, None)
    assert searched == 600
    _, searched = update(ids, x, 5, lists)
    assert searched == 60


@pytest.mark.parametrize("case", CASES)
def test_new_rows_anywhere_between_the_old_ones(case: str) -> None:
    x = draw(case, 660)
    ids = [f"i{row}" for row in range(660)]
    old = np.sort(np.random.default_rng(1).permutation(660)[:600])
    lists, _ = update([ids[row] for row in old], x[old], 5, None)
    assert update(ids, x, 5, lists)[1] == 60


def test_only_new_columns_are_searched_for_old_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw("plain", 440)
    ids = [f"i{row}" for row in range(440)]
    lists, _ = neighbours(keys_of(ids[:400], x[:400]), torch.from_numpy(x[:400]), 5, None)
    asked = []

    def watched(vectors: Any, k: int, rows: Any = None, among: Any = None) -> Any:
        asked.append((rows.tolist(), None if among is None else among.tolist()))
        return knn(vectors, k, rows=rows, among=among)

    monkeypatch.setattr(kept, "knn", watched)
    neighbours(keys_of(ids, x), torch.from_numpy(x), 5, lists)
    old, new = list(range(400)), list(range(400, 440))
    assert asked == [(new, None), (old, new)]


def test_rows_that_lost_few_neighbours_are_not_searched_again() -> None:
    x = draw("plain", 400)
    ids = [f"i{row}" for row in range(400)]
    lists, _ = update(ids, x, 10, None)
    stays = np.delete(np.arange(400), [7, 120, 301])
    _, searched = update([ids[row] for row in stays], x[stays], 10, lists)
    assert searched == 0
    # A hub is in most lists together with its copies: without them too little of those lists is certain.
    x[1 : SPARE + 3] = x[0]
    lists, _ = update(ids, x, 10, None)
    stays = np.arange(SPARE + 2, 400)
    _, searched = update([ids[row] for row in stays], x[stays], 10, lists)
    gone = (lists.indices < SPARE + 2).sum(axis=1)[stays]
    assert searched == (gone > SPARE).sum() > 0


def test_a_changed_vector_is_a_row_that_went_and_one_that_came() -> None:
    x = draw("plain", 300)
    ids = [f"i{row}" for row in range(300)]
    lists, _ = update(ids, x, 5, None)
    x[17] = draw("plain", 1, seed=9)[0]
    lists, searched = update(ids, x, 5, lists)
    assert searched == 1
    assert update(ids, x, 5, lists)[1] == 0


@pytest.mark.parametrize("case", CASES)
def test_renumbered_rows_of_equal_scores_stand_in_their_new_order(case: str) -> None:
    x = draw(case, 200)
    ids = [f"i{row}" for row in range(200)]
    lists, _ = update(ids, x, 5, None)
    order = np.random.default_rng(2).permutation(200)
    _, searched = update([ids[row] for row in order], x[order], 5, lists)
    assert (searched == 0) is (case == "plain")


def test_where_most_is_new_all_is_searched() -> None:
    x = draw("plain", 300)
    ids = [f"i{row}" for row in range(300)]
    lists, _ = update(ids[:100], x[:100], 5, None)
    assert update(ids, x, 5, lists)[1] == 300


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_changes(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    case, k = data.draw(st.sampled_from(CASES)), data.draw(st.integers(1, 6))
    pool = draw(case, 120, seed=3)
    here, lists = list(rng.permutation(120)[: data.draw(st.integers(k, 60))]), None
    for _ in range(3):
        lists, _ = update([f"i{row}" for row in here], pool[here], k, lists)
        gone = set(rng.choice(here, data.draw(st.integers(0, min(8, len(here) - k))), replace=False))
        fresh = [row for row in rng.permutation(120)[: data.draw(st.integers(0, 12))] if row not in here]
        here = [row for row in here if row not in gone] + fresh
        if data.draw(st.booleans()):
            here = sorted(here)
        pool[rng.choice(120, data.draw(st.integers(0, 3)))] = draw(case, 1, seed=int(rng.integers(99)))[0]
    update([f"i{row}" for row in here], pool[here], k, lists)


def run(folder: Path, x: np.ndarray, status: list[str], code: str, **more: Any) -> tuple[dict[str, Any], bytes]:
    folder.mkdir(exist_ok=True)
    write_features(folder / "f.parquet", [f"i{row}" for row in range(len(x))], x, status, {"model": "m"})
    output = folder / "s.parquet"
    output.unlink(missing_ok=True)  # as Snakemake does before it runs a job
    facts = similarity(features=folder / "f.parquet", output=output, knn_k=4, code=code, **more)
    return facts, output.read_bytes()


@pytest.mark.parametrize("missing", ["drop", "mean"])
def test_the_stage_writes_the_bytes_of_a_full_rerun(tmp_path: Path, missing: str) -> None:
    x = draw("plain", 330)
    status = ["ok"] * 330
    status[3], status[5] = "missing", "failed"
    facts, _ = run(tmp_path / "grown", x[:300], status[:300], "a", missing=missing)
    assert facts["searched"] == (300 if missing == "mean" else 298)
    facts, grown = run(tmp_path / "grown", x, status, "a", missing=missing)
    fresh, whole = run(tmp_path / "fresh", x, status, "a", missing=missing)
    assert grown == whole
    # Missing items have the mean of the others, which is another vector now.
    assert (
        facts["searched"] == (32 if missing == "mean" else 30)
        and fresh["searched"] == fresh["items"] - (missing == "drop") * 2
    )


@pytest.mark.parametrize("why", ["other code", "no code", "damaged"])
def test_graphs_that_may_not_hold_are_not_taken_up(tmp_path: Path, why: str) -> None:
    x = draw("plain", 100)
    run(tmp_path, x[:95], ["ok"] * 95, "" if why == "no code" else "a")
    stored = tmp_path / ".kept/s.parquet"
    assert stored.exists() is (why != "no code")
    if why == "damaged":
        stored.write_bytes(stored.read_bytes()[:-9])
    facts, _ = run(tmp_path, x, ["ok"] * 100, {"other code": "b", "no code": "", "damaged": "a"}[why])
    assert facts["searched"] == 100
