"""Lists of other tools: reading, masking, and the metrics of a loop over users."""

import gzip
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cm3.common.errors import UserError
from cm3.common.interactions import Interactions
from cm3.common.strict import validate
from cm3.evaluation import external as module
from cm3.evaluation.external import read_lists
from cm3.evaluation.external_config import External
from cm3.evaluation.metrics import per_user
from cm3.evaluation.ranking import Ranking

USERS = [f"u{n}" for n in range(6)]
ITEMS = [f"{n:03d}" for n in range(12)]


@pytest.fixture
def data() -> Interactions:
    rng = np.random.default_rng(3)
    pairs = np.argwhere(rng.random((len(USERS), len(ITEMS))) < 0.5)
    split = rng.integers(0, 3, len(pairs)).astype(np.int8)
    return Interactions(pairs[:, 0], pairs[:, 1], split, USERS, ITEMS)


def spec(path: Path, **settings: object) -> External:
    return validate(External, {"recommendations": str(path), **settings}, "model")


def write(path: Path, rows: list[str], header: str = "user,item,score") -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


def read(path: Path, data: Interactions, **settings: object) -> module.ExternalLists:
    return read_lists(spec(path, **settings), data, path)


def all_lists(seed: int = 1) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    return {user: rng.permutation(ITEMS).tolist() for user in USERS}


def by_score(lists: dict[str, list[str]], path: Path) -> Path:
    rows = [f"{user},{item},{-rank / 7}" for user, items in lists.items() for rank, item in enumerate(items)]
    return write(path, np.random.default_rng(0).permutation(rows).tolist())


@pytest.mark.parametrize("mask", [("train",), ("train", "valid")])
def test_metrics_are_those_of_a_loop_over_users(tmp_path: Path, data: Interactions, mask: tuple[str, ...]):
    lists = all_lists()
    masked, truth = data.matrix(*mask), data.truth("test")
    users = np.flatnonzero(np.diff(truth.indptr))
    found, scores = read(by_score(lists, tmp_path / "lists.csv"), data)(Ranking(users, masked), 4)
    assert found.shape == scores.shape == (len(users), 4)
    values = per_user(found, truth[users], [4])
    for row, user in enumerate(users):
        seen = {ITEMS[item] for item in masked[[user]].indices}
        relevant = {ITEMS[item] for item in truth[[user]].indices}
        kept = [item for item in lists[USERS[user]] if item not in seen][:4]
        assert [ITEMS[item] for item in found[row] if item >= 0] == kept
        gains = [1 / np.log2(rank + 2) for rank, item in enumerate(kept) if item in relevant]
        ideal = sum(1 / np.log2(rank + 2) for rank in range(min(4, len(relevant))))
        assert values["recall@4"][row] == pytest.approx(len(gains) / len(relevant))
        assert values["ndcg@4"][row] == pytest.approx(sum(gains) / ideal)
        assert (np.diff(scores[row, : len(kept)]) < 0).all()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("order", ["rank", "score"])
def test_every_format_gives_the_same(tmp_path: Path, data: Interactions, suffix: str, order: str):
    lists = all_lists()
    rows = [(u, i, rank) for u, items in lists.items() for rank, i in enumerate(items, 1)]
    values = [rank if order == "rank" else 1 / rank for *_, rank in rows]
    table = pa.table({"user_id": [u for u, *_ in rows], "item_id": [i for _, i, _ in rows], order: values})
    path = tmp_path / f"lists.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "jsonl":
        path.write_text(
            "".join(
                f'{{"user_id": "{u}", "item_id": "{i}", "{order}": {v}}}\n'
                for (u, i, _), v in zip(rows, values, strict=True)
            )
        )
    else:
        mark = "\t" if suffix == "tsv" else ","
        lines = [
            mark.join(table.column_names),
            *(mark.join([u, i, str(v)]) for (u, i, _), v in zip(rows, values, strict=True)),
        ]
        text = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(text) if suffix == "csv.gz" else text)
    found, _ = read(path, data)(Ranking(np.arange(len(USERS)), sp.csr_matrix((len(USERS), len(ITEMS)))), 5)
    assert found.tolist() == [[ITEMS.index(item) for item in lists[user][:5]] for user in USERS]


def test_ids_are_compared_as_text(tmp_path: Path):
    numbers = Interactions(np.array([0]), np.array([0]), np.array([0], np.int8), ["7", "10"], ["1", "2", "03"])
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"user": [10.0, 10.0], "item": [2, 1], "rank": [1, 2]}), path)
    lists = read(path, numbers)
    assert lists.offsets.tolist() == [0, 0, 2] and lists.items.tolist() == [1, 0]
    with pytest.raises(UserError, match="none of its items is in the dataset"):
        read(write(tmp_path / "lists.csv", ["10,3,1"]), numbers)


def test_unknown_ids_are_counted(tmp_path: Path, data: Interactions, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "lists.csv", ["u0,000,3", "u0,nowhere,2", "u0,001,1", "stranger,000,1", "u1,x,1"])
    lists = read(path, data)
    assert lists.counts == {"rows": 5, "users": 1, "unknown_user_rows": 1, "unknown_item_rows": 2}
    assert lists.items.tolist() == [0, 1]
    assert "2 of 5 rows name items that the dataset lacks, such as 'nowhere'" in caplog.text
    assert "1 of 5 rows name users that the dataset lacks, such as 'stranger'" in caplog.text


def test_short_lists_are_reported(tmp_path: Path, data: Interactions, caplog: pytest.LogCaptureFixture):
    lists = all_lists()
    lists["u1"], lists["u2"] = lists["u1"][:3], []
    path = by_score(lists, tmp_path / "lists.csv")
    seen = sp.csr_matrix((np.ones(2), ([0, 1], [ITEMS.index(lists["u0"][0]), ITEMS.index(lists["u1"][1])])), (6, 12))
    lists_read = read(path, data)
    found = lists_read.check_lengths(np.arange(6), seen, [2, 11, 12], path)
    assert found["masked"] == 2 and found["without_items"] == 1 and lists_read.counts["users"] == 5
    assert [found[f"shorter_than_{k}"] for k in (2, 11, 12)] == [1, 2, 3]
    assert "1 of 6 users; their metrics are 0" in caplog.text
    assert "2 of 6 users have fewer than 11 items" in caplog.text


def test_complete_lists_say_nothing(tmp_path: Path, data: Interactions, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    path = by_score(all_lists(), tmp_path / "lists.csv")
    read(path, data).check_lengths(np.arange(6), sp.csr_matrix((6, 12)), [12], path)
    assert not caplog.text


def test_small_blocks_give_the_same(tmp_path: Path, data: Interactions, monkeypatch: pytest.MonkeyPatch):
    lists = all_lists()
    lists["u3"] = []
    read_once = read(by_score(lists, tmp_path / "lists.csv"), data)
    ranking = Ranking(np.arange(6), data.matrix("train"))
    whole = read_once(ranking, 5)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 1)
    assert all(map(np.array_equal, read_once(ranking, 5), whole))


def test_equal_scores_are_ordered_by_item(tmp_path: Path, data: Interactions):
    lists = read(write(tmp_path / "lists.csv", ["u0,005,1", "u0,002,1", "u0,003,1", "u0,001,2"]), data)
    assert lists.items.tolist() == [1, 2, 3, 5]


def test_chosen_columns_are_read(tmp_path: Path, data: Interactions):
    path = write(tmp_path / "lists.csv", ["u0,001,1,9", "u0,002,2,10"], "who,what,rank,points")
    assert read(path, data, user_column="who", item_column="what").items.tolist() == [1, 2]
    scored = read(path, data, user_column="who", item_column="what", score_column="points")
    assert scored.items.tolist() == [2, 1] and scored.scores.tolist() == [10, 9]


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["u0,001,1"], "person,item,rank", r"none of the columns user, user_id, userID, only person, item, rank; set model.user_column"),
        (["u0,001"], "user,item", r"none of the columns rank, score"),
        (["u0,001,1", "u0,001,2"], "user,item,rank", "user 'u0' has item '001' twice"),
        (["u0,001,1", "u0,002,1"], "user,item,rank", "user 'u0' has two items at rank 1"),
        (["u0,001,1", "u0,002,x"], "user,item,rank", "line 3: rank = 'x' is not a finite number"),
        (["u0,001,nan"], "user,item,score", "line 2: score = 'nan' is not a finite number"),
        (["u0,001,1", ",002,2"], "user,item,rank", "line 3: user = '' is empty; every recommendation needs a user"),
        (["1,001,1", "2,002,1"], "user,item,rank", "none of its users is in the dataset; they are like '1', those of the dataset like 'u0'"),
        (["u0,x,1", "y,001,1"], "user,item,rank", "no row has both a user and an item of the dataset"),
        ([], "user,item,rank", "has no rows"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, data: Interactions, rows: list[str], header: str, message: str):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "lists.csv", rows, header), data)


def test_a_missing_file_is_named(tmp_path: Path, data: Interactions):
    for suffix in ("csv", "parquet", "jsonl"):
        with pytest.raises(UserError, match=f"absent.{suffix}: no such file"):
            read(tmp_path / f"absent.{suffix}", data)


def test_settings():
    assert "recommendations" not in External(recommendations="a.csv").identity()
    assert External(recommendations="a.csv").identity() == External(recommendations="b/c.csv").identity()
    assert External(recommendations="lists.parquet").exports == "lists"
    with pytest.raises(UserError, match=r"unknown suffix in 'lists\.txt', and no folder; set format"):
        validate(External, {"recommendations": "lists.txt"}, "model")
    with pytest.raises(UserError, match="name one of them"):
        validate(External, {"recommendations": "a.csv", "rank_column": "a", "score_column": "b"}, "model")
