"""Reading of interactions: labels of the split from dictionaries in any order, over several row groups."""

from pathlib import Path

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3.common.errors import UserError
from cm3.common.interactions import read_interactions
from cm3.common.tables import CATEGORY, SPLITS

LABELS = ["test", "train", "train", "valid", "test", "train", "valid", "train"]


def shop(folder: Path, labels: list[str | None]) -> dict[str, Path]:
    """Tables of eight interactions with these labels, in row groups with dictionaries of their own."""
    numbers = np.arange(8)
    paths = oracle.write_interactions(folder, numbers % 3, numbers % 2, np.zeros(8, np.int8), 3, 2)
    table = pq.read_table(paths["interactions"])
    column = pa.array(labels, pa.string()).dictionary_encode().cast(CATEGORY)
    place = table.schema.get_field_index("split")
    pq.write_table(table.set_column(place, table.schema.field(place), column), paths["interactions"], row_group_size=3)
    return paths


def test_labels_are_positions_of_the_splits(tmp_path: Path):
    found = read_interactions(*(shop(tmp_path, LABELS)[name] for name in ("interactions", "items", "users")))
    assert [SPLITS[label] for label in found.split] == LABELS and found.split.dtype == np.int8


@pytest.mark.parametrize("label", ["later", None])
def test_a_row_without_a_split_is_named(tmp_path: Path, label: str | None):
    paths = shop(tmp_path, [*LABELS[:5], label, *LABELS[6:]])
    with pytest.raises(UserError, match=f"row 5 has split {label!r}, not one of"):
        read_interactions(*(paths[name] for name in ("interactions", "items", "users")))


def test_the_digest_stays_without_the_rows(tmp_path: Path):
    whole = read_interactions(*(shop(tmp_path, LABELS)[name] for name in ("interactions", "items", "users")))
    found = whole.without_rows()
    assert len(found.users) == len(found.items) == len(found.split) == 0 and len(whole.users) == 8
    assert found.digest == whole.digest and found.user_ids == whole.user_ids and found.item_ids == whole.item_ids
