"""What a comparison refuses: cells that cannot be compared, and files that do not belong together."""

import numpy as np
import pyarrow as pa
import pytest
from study_runs import changed, edited_json, one_thread, run, study  # noqa: F401

from cm3.common.errors import UserError


def drop_user(table):
    return table.slice(1)


def other_user(table):
    users = table["user"].to_numpy().copy()
    users[0] = 10**6
    return table.set_column(0, "user", pa.array(users, pa.int32()))


def worse(table):
    column = table.column_names.index("recall@10")
    return table.set_column(column, "recall@10", pa.array(table["recall@10"].to_numpy() * 0.5))


def swapped(table):
    # Two hits and two misses change places: the mean stays, the users do not.
    values = table["recall@10"].to_numpy()[::-1].copy()
    return table.set_column(table.column_names.index("recall@10"), "recall@10", pa.array(values))


def with_ids(table):
    """A run's recommendations as earlier releases wrote them."""
    ids = {f"{kind}_id": pa.array([f"{kind}{n}" for n in table[kind].to_pylist()]) for kind in ("user", "item")}
    return pa.table(ids | {name: table[name] for name in ("rank", "score")})


def stranger(table):
    table = with_ids(table)
    return table.set_column(1, "item_id", pa.array(["nobody", *table["item_id"].to_pylist()[1:]]))


def beyond_the_items(table):
    return table.set_column(1, "item", pa.array([60, *table["item"].to_pylist()[1:]], pa.int32()))


def twice(table):
    ranks = table["rank"].to_numpy().copy()
    ranks[1] = ranks[0]
    return table.set_column(2, "rank", pa.array(ranks))


def undefined(table):
    vectors = np.stack(table["embedding"].to_numpy())
    vectors[7, 2] = np.nan
    flat = pa.array(vectors.ravel(), pa.float32())
    return table.set_column(1, "embedding", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        (
            "per_user",
            drop_user,
            r"119 test users, the study's first run 120; 1 users are in one only \(first: user 0\)",
        ),
        ("per_user", other_user, "users are in one only"),
        (
            "per_user",
            lambda table: table.drop_columns(["ndcg@10"]),
            r"no column ndcg@10.*evaluation.ks of experiment 'bm3'",
        ),
        ("per_user", worse, "the mean of recall@10 is .* delete both"),
        ("per_user", swapped, "recall@10 of the lists differs"),
        ("recommendations", stranger, "'nobody' is not an id"),
        ("recommendations", beyond_the_items, "60 is not a row of the 60 of the data set"),
        (
            "recommendations",
            lambda table: table.replace_schema_metadata({"ids": '"other"'}),
            "its numbers are rows of other tables",
        ),
        ("recommendations", twice, "two items at the same rank"),
        ("recommendations", lambda table: table.drop_columns(["rank"]), "has no column rank"),
        ("user_embeddings", lambda table: table.slice(1), "its 119 ids are not those of the data set, in order"),
        ("user_embeddings", lambda table: table.slice(0, 119), "its 119 ids are not those of the data set"),
        ("item_embeddings", lambda table: pa.concat_tables([table, table]), "its 120 ids are not those"),
        ("item_embeddings", undefined, "the vector of item_id item7 holds NaN or infinity"),
        ("item_embeddings", lambda table: table.drop_columns(["embedding"]), "has columns .'item_id'., not"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(study, tmp_path, kind, edit, message):
    _, spec, inputs, *_ = study
    with pytest.raises(UserError, match=message) as found:
        run(spec, changed(inputs, kind, edit), tmp_path)
    assert "/bm3/" in str(found.value)
    assert not list(tmp_path.iterdir()), "nothing half-made is written"


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("train", lambda x: x | {"best_valid": None}, "best_valid is None; bm3 .* has no validation score"),
        ("train", lambda x: {k: v for k, v in x.items() if k != "best_valid"}, "has no validation score"),
        ("train", lambda x: x | {"monitor": "ndcg@20"}, "training.monitor is 'ndcg@20' in .* but 'recall@10' in"),
        ("evaluation", lambda x: x | {"mask": "train+valid"}, "evaluation.mask is 'train' in .* but 'train.valid' in"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(study, tmp_path, kind, edit, message):
    _, spec, inputs, *_ = study
    with pytest.raises(UserError, match=message):
        run(spec, edited_json(inputs, kind, edit), tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"reference": "cm4"}, r"'cm4' is not one of its experiments.*did you mean 'cm3'"),
        ({"metrics": ["recall@10", "recall@10"]}, "duplicate metric"),
        ({"metrics": ["recall"]}, "no column recall"),
        ({"metric": []}, r"study.metric: unknown key \(did you mean 'metrics'"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(study, tmp_path, edit, message):
    _, spec, inputs, *_ = study
    with pytest.raises(UserError, match=message):
        run(spec, inputs, tmp_path, **edit)


def test_cells_that_make_no_study_are_refused(study, tmp_path):
    _, spec, inputs, *_ = study
    cells, experiments = spec["cells"], spec["experiments"]
    with pytest.raises(
        UserError, match=r"cm3 has seeds \[1, 2, 3\] at model.gamma = 0.1, but \[1, 2\] at model.gamma = 0.9"
    ):
        run(spec, inputs, tmp_path, cells=[c for c in cells if (c["point"], c["seed"]) != ({"model.gamma": 0.9}, 3)])
    with pytest.raises(UserError, match="has seed 1 twice"):
        run(spec, inputs, tmp_path, cells=[*cells, cells[0]])
    with pytest.raises(UserError, match="bm3 has no run"):
        run(spec, inputs, tmp_path, cells=[cell for cell in cells if cell["experiment"] != "bm3"])
    with pytest.raises(UserError, match="need the same dataset"):
        run(spec, inputs, tmp_path, experiments=experiments | {"bm3": experiments["bm3"] | {"dataset": "baby"}})
    with pytest.raises(UserError, match="its per_user is not among the inputs"):
        run(spec, {n: p for n, p in inputs.items() if not n.startswith("per_user.bm3")}, tmp_path)
