"""The data that the runs of a comparison share: interactions, test users and slices, for each split of the study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cm3.common.errors import UserError
from cm3.common.interactions import Interactions, read_interactions
from cm3.evaluation.recommendations import Ids, ids_of
from cm3.reports.analysis.category_calibration import read_item_categories
from cm3.reports.analysis.diversity import read_unit_vectors
from cm3.reports.analysis.geometry import EmbeddingSample, draw_sample
from cm3.reports.analysis.runs import Run, read_per_user
from cm3.reports.analysis.slices import Slices
from cm3.reports.analysis.spec import StudySpec
from cm3.reports.analysis.user_gap import activity_groups
from cm3.reports.analysis.user_groups import compared_groups, read_user_groups


@dataclass(frozen=True)
class Data:
    """The data set and test users that all runs on a split share.

    `categories` (I, C) is None where no item has any; `vectors` holds the features that diversity is measured by. `groups`
    are the masks of the groups of users by column of the users' table, and by activity under "".
    """

    interactions: Interactions
    ids: Ids
    users: np.ndarray
    counts: np.ndarray
    n_train_users: int
    slices: Slices
    sample: EmbeddingSample
    history: sp.csr_matrix
    categories: sp.csr_matrix | None
    groups: Mapping[str, Sequence[np.ndarray]]
    vectors: Mapping[str, np.ndarray]


def read_splits(study: StudySpec, inputs: Mapping[str, Path], runs: Sequence[Run]) -> dict[int | None, Data]:
    """Return the data of each split by its seed, in the order of the study.

    Args:
        study: the study.
        inputs: the tables of the dataset; `interactions` is its own split, `interactions-SEED` a further one.
        runs: of one experiment, on all splits.

    Raises:
        UserError: splits with different test users.
    """
    found: dict[int | None, Data] = {}
    for run in runs:
        if run.spec.split not in found:
            name = f"interactions-{run.spec.split}"
            data = _read_data(study, inputs, inputs.get(name, inputs["interactions"]), run)
            first = next(iter(found.values()), data)
            if not np.array_equal(data.users, first.users):
                raise UserError(
                    f"{inputs[name]}: has {len(data.users)} test users, and {inputs['interactions']} {len(first.users)}; models "
                    "are compared user by user, on splits with equal test users"
                )
            found[run.spec.split] = data
    return found


def _read_data(study: StudySpec, inputs: Mapping[str, Path], table: Path, first: Run) -> Data:
    interactions = read_interactions(table, inputs["items"], inputs["users"])
    users, n_test, _ = read_per_user(first, study.metrics)
    train, test = interactions.matrix("train"), interactions.truth("test")
    sizes = np.diff(test.indptr)
    if not np.array_equal(np.flatnonzero(sizes), users) or not np.array_equal(sizes[users], n_test):
        raise UserError(
            f"{first.files['per_user']}: its users and numbers of test items differ from the test split of "
            f"{table}; delete the run's evaluation and run again"
        )
    cutoffs = sorted({_cutoff(metric) for metric in study.metrics})
    counts = np.asarray(train.sum(0)).ravel().astype(np.int64)
    n_users = int((np.diff(train.indptr) > 0).sum())
    table_of_groups = inputs.get("user_groups")
    groups = read_user_groups(table_of_groups, users, len(interactions.user_ids)) if table_of_groups else []
    slices = Slices(users, train, test, cutoffs, groups)
    sample = draw_sample(train, study.bootstrap_seed)
    categories = read_item_categories(inputs["items"])
    return Data(
        interactions,
        ids_of(interactions.user_ids, interactions.item_ids),
        users,
        counts,
        n_users,
        slices,
        sample,
        sp.csr_matrix(train[users]),
        categories,
        {"": activity_groups(np.diff(train.indptr)[users]), **compared_groups(groups)},
        {
            name.removeprefix("features."): read_unit_vectors(path, interactions.item_ids)
            for name, path in inputs.items()
            if name.startswith("features.")
        },
    )


def _cutoff(metric: str) -> int:
    name, _, k = metric.partition("@")
    if not (name and k.isdigit()):
        raise UserError(f"metrics = {metric!r}: expected a metric with a cut-off, such as recall@20")
    return int(k)
