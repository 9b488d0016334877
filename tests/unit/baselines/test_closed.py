"""The closed forms against loops and direct solutions."""

import baseline_shop as small
import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from training_shop import prepared

from cm3.baselines.cease import CEASE
from cm3.baselines.closed_forms import cease, itemknn, mm_gf
from cm3.baselines.ease import EASE
from cm3.baselines.inputs import Inputs
from cm3.baselines.itemknn import ItemKNN
from cm3.baselines.itemknn_content import ItemKNNContent
from cm3.baselines.mm_gf import MMGF
from cm3.baselines.mostpop import MostPop
from cm3.common.errors import UserError
from cm3.evaluation.item_weights import read_item_weights
from cm3.model_registry import parse_model
from cm3.model_spec import modality_weights

CPU = torch.device("cpu")


def shop(seed: int, n_users: int = 30, n_items: int = 12, share: float = 0.3) -> sp.csr_matrix:
    """Random pairs in which the last item belongs to nobody and the last user has nothing."""
    x = (np.random.default_rng(seed).random((n_users, n_items)) < share).astype(np.float32)
    x[:, -1] = x[-1] = 0
    return sp.csr_matrix(x)


def dense(weights) -> np.ndarray:
    return weights.matrix if isinstance(weights.matrix, np.ndarray) else weights.matrix.toarray()


def test_mostpop_scores_every_item_by_its_users():
    x = shop(0)
    solution = MostPop().solve(Inputs(x), CPU)
    assert (solution.users @ solution.items.T).tolist() == [x.toarray().sum(0).tolist()] * 30


@given(seed=st.integers(0, 1000), k=st.integers(1, 14), shrink=st.sampled_from([0.0, 1.0, 10.0]))
def test_itemknn_is_the_shrunk_cosine_of_each_items_nearest(seed, k, shrink):
    x = shop(seed)
    have = [set(np.flatnonzero(column)) for column in x.toarray().T]
    expected, cosines = np.zeros((12, 12)), np.zeros((12, 12))
    for i in range(12):
        near = []
        for j in range(12):
            both = len(have[i] & have[j])
            if j != i and both:
                cosines[j, i] = both / ((len(have[i]) * len(have[j])) ** 0.5 + shrink)
                near.append((-cosines[j, i], j))
        for value, j in sorted(near)[:k]:
            expected[j, i] = -value
    found = ItemKNN(k=k, shrink=shrink).solve(Inputs(x), CPU)
    # Of equal cosines that float32 rounds apart, either may be the k-th neighbour.
    weights = dense(found)
    np.testing.assert_allclose(np.sort(weights, axis=0), np.sort(expected, axis=0), rtol=1e-6, atol=0)
    np.testing.assert_allclose(weights[weights > 0], cosines[weights > 0], rtol=1e-6, atol=0)
    scores = found.scores(x)(torch.arange(30)).numpy()
    sums = [[sum(weights[j, i] for j in np.flatnonzero(row)) for i in range(12)] for row in x.toarray()]
    np.testing.assert_allclose(scores, sums, rtol=1e-5, atol=1e-7)


def test_itemknn_is_the_same_in_blocks_of_any_size(monkeypatch):
    x = shop(3, 200, 40)
    whole = ItemKNN(k=5).solve(Inputs(x), CPU).matrix
    blocks = 0
    slices = itemknn.item_blocks

    def counted(*arguments):
        nonlocal blocks
        for block in slices(*arguments):
            blocks += 1
            yield block

    monkeypatch.setattr(itemknn, "BLOCK_PRODUCTS", 2000)
    monkeypatch.setattr(itemknn, "item_blocks", counted)
    parted = ItemKNN(k=5).solve(Inputs(x), CPU).matrix
    assert blocks > 5 and (whole != parted).nnz == 0


def test_content_is_the_weighted_cosine_of_shared_modalities():
    rng = np.random.default_rng(1)
    features = {"text": rng.standard_normal((12, 4)), "image": 50 * rng.standard_normal((12, 3))}
    features = {m: x.astype(np.float32) for m, x in features.items()}
    features["text"][2] = features["image"][5] = 0
    features["text"][9] = features["image"][9] = 0
    weights = {"text": 0.75, "image": 0.25}
    found = dense(ItemKNNContent(k=3).solve(Inputs(shop(0), features, {}, weights), CPU))
    expected = np.zeros((12, 12))
    for i in range(12):
        values = []
        for j in range(12):
            total, own = 0.0, [0.0, 0.0]
            for m, x in features.items():
                lengths = np.linalg.norm(x[[i, j]].astype(float), axis=1)
                own = [o + weights[m] * (length > 0) for o, length in zip(own, lengths, strict=True)]
                if lengths.all():
                    total += weights[m] * float(x[i].astype(float) @ x[j]) / lengths.prod()
            if i != j and all(own):
                values.append((total / (own[0] * own[1]) ** 0.5, j))
        for value, j in sorted(values, key=lambda pair: (-pair[0], pair[1]))[:3]:
            expected[j, i] = value
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert not found[9].any() and not found[:, 9].any()


def test_content_of_too_few_items_is_refused():
    features = {"text": np.eye(12, 4, dtype=np.float32)}
    with pytest.raises(UserError, match=r"model\.k = 4: only 4 items have a vector; lower it below 4"):
        ItemKNNContent(k=4).solve(Inputs(shop(0), features, {}, {"text": 1.0}), CPU)


def filter_inputs() -> Inputs:
    """Two modalities of twelve items; item 9 has no vector, and a column is constant."""
    rng = np.random.default_rng(1)
    features = {m: rng.standard_normal((12, d)).astype(np.float32) for m, d in (("text", 4), ("image", 3))}
    features["text"][:, 2] = 0.5
    features["text"][9] = features["image"][9] = 0
    return Inputs(shop(0), features, {}, {"text": 0.75, "image": 0.25})


def test_mm_gf_is_the_sum_of_filters_of_co_occurrence_and_content():
    given = filter_inputs()
    found = dense(MMGF(alpha=0.8, power=0.6, content_weight=7.0).solve(given, CPU))
    x = given.interactions.toarray().astype(float)
    expected = np.zeros((12, 12))
    for i in range(12):
        for j in range(12):
            both = [u for u in range(30) if x[u, i] and x[u, j]]
            total = sum(x[u].sum() ** -1.6 * (x[:, i].sum() * x[:, j].sum()) ** -0.2 for u in both)
            expected[i, j] = total**0.6
    usable = [i for i in range(12) if i != 9]
    for weight, values in zip((0.75, 0.25), given.features.values(), strict=True):
        scaled = np.zeros((11, values.shape[1]))
        for column in range(values.shape[1]):
            entries = values[usable, column].astype(float)
            low, high = np.quantile(entries, 0.25), np.quantile(entries, 0.75)
            scaled[:, column] = (entries - np.median(entries)) / ((high - low) or 1)
        scaled -= scaled.min()
        for a, i in enumerate(usable):
            for b, j in enumerate(usable):
                entries = scaled[a] * scaled[b] * scaled.sum(0) ** -0.4
                similarity = entries.sum() * (scaled[a].sum() * scaled[b].sum()) ** -0.8
                expected[i, j] += 7.0 * weight * similarity**0.6
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("modalities", "expected"),
    [
        (["text", "image"], {"text": 599.9, "image": 0.1}),
        (["image"], {"image": 0.1}),
        (["text"], {"text": 600.0}),
        (["text", "image", "caption"], {"text": 299.95, "image": 0.1, "caption": 299.95}),
    ],
)
def test_mm_gf_weighs_modalities_as_the_published_code_does(modalities, expected):
    settings = MMGF()
    given = Inputs(shop(0), dict.fromkeys(modalities, np.zeros((12, 2))), {}, modality_weights(settings, modalities))
    found = {m: mm_gf.content_weight(given, settings) * share for m, share in given.weights.items()}
    assert found == pytest.approx(expected)


def test_mm_gf_is_the_same_in_blocks_of_any_size(monkeypatch):
    whole = dense(MMGF().solve(filter_inputs(), CPU))
    monkeypatch.setattr(mm_gf, "BLOCK_ENTRIES", 60)
    np.testing.assert_allclose(dense(MMGF().solve(filter_inputs(), CPU)), whole, rtol=1e-6, atol=0)


def test_mm_gf_of_too_many_items_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"63001 x 63001 items, which takes about 32 GB .* use itemknn-content"):
        MMGF().solve(Inputs(sp.csr_matrix((3, 63_001))), CPU)
    with pytest.raises(UserError, match=r"model\.max_items = 11"):
        MMGF(max_items=11).solve(filter_inputs(), CPU)
    MMGF(max_items=12).solve(filter_inputs(), CPU)


@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_ease_is_ridge_regression_of_each_item_on_the_others(l2):
    x = shop(4, 60, 12).toarray().astype(float)
    found = dense(EASE(l2=l2).solve(Inputs(sp.csr_matrix(x)), CPU))
    for j in range(12):
        others = [i for i in range(12) if i != j]
        a = x[:, others]
        expected = np.linalg.solve(a.T @ a + l2 * np.eye(11), a.T @ x[:, j])
        np.testing.assert_allclose(found[others, j], expected, rtol=0, atol=1e-7)
        assert found[j, j] == 0


def test_ease_of_too_many_items_is_refused_with_the_reason():
    x = sp.csr_matrix((3, 63_001))
    with pytest.raises(UserError, match=r"63001 x 63001 items, which takes about 48 GB .* use itemknn"):
        EASE().solve(Inputs(x), CPU)
    with pytest.raises(UserError, match=r"model\.max_items = 11"):
        EASE(max_items=11).solve(Inputs(shop(0)), CPU)
    EASE(max_items=12).solve(Inputs(shop(0)), CPU)


@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_cease_is_ridge_regression_on_interactions_and_features(weight):
    given = filter_inputs()
    given.features["image"][4] = 0
    found = dense(CEASE(l2=2.0, content_weight=weight).solve(given, CPU))
    x = given.interactions.toarray().astype(float)
    rows = [x]
    for share, values in zip((0.75, 0.25), given.features.values(), strict=True):
        lengths = [float(np.linalg.norm(v.astype(float))) or 1.0 for v in values]
        unit = values.astype(float) / np.array(lengths)[:, None]
        # A feature is a further user: as a trace, that of all cosines is then `weight` times that of co-occurrence.
        rows.append(np.sqrt(weight * share * x.sum() / 12) * unit.T)
    data = np.concatenate(rows)
    for j in range(12):
        others = [i for i in range(12) if i != j]
        a = data[:, others]
        expected = np.linalg.solve(a.T @ a + 2.0 * np.eye(11), a.T @ data[:, j])
        np.testing.assert_allclose(found[others, j], expected, rtol=0, atol=1e-6)
        assert found[j, j] == 0


@pytest.mark.parametrize("model", [EASE(), CEASE()], ids=["ease", "cease"])
def test_item_weights_are_in_rows(model):
    """SciPy copies a matrix in columns at every product with the interactions of some users."""
    assert model.solve(filter_inputs(), CPU).matrix.flags["C_CONTIGUOUS"]


def test_cease_without_content_is_ease():
    given = filter_inputs()
    found, plain = (model.solve(given, CPU).matrix for model in (CEASE(l2=7.0, content_weight=0), EASE(l2=7.0)))
    assert np.array_equal(found, plain) and found.any()


def test_cease_is_the_same_in_blocks_of_any_size(monkeypatch):
    whole = dense(CEASE().solve(filter_inputs(), CPU))
    monkeypatch.setattr(cease, "BLOCK_ROWS", 5)
    np.testing.assert_allclose(dense(CEASE().solve(filter_inputs(), CPU)), whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", [{"content_weight": 1e300}, {"l2": 1e-20, "content_weight": 1e20}])
def test_a_matrix_without_an_inverse_is_refused_with_the_settings_to_change(settings):
    with pytest.raises(UserError, match=r"model\.l2 = .*raise it, or lower content_weight"):
        CEASE(**settings).solve(filter_inputs(), CPU)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "1e999"])
def test_a_setting_that_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match=r"here\.content_weight"):
        parse_model({"name": "cease", "content_weight": value}, "here")


def test_cease_of_too_many_items_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"model\.max_items = 11: cease inverts a matrix of 12 x 12 items"):
        CEASE(max_items=11).solve(filter_inputs(), CPU)


@pytest.mark.parametrize("name", ["ease", "cease", "itemknn", "mm-gf"])
def test_weights_come_back_from_their_file(tmp_path, name):
    (tmp_path / "data").mkdir()
    data = prepared(tmp_path / "data")
    small.fit(data, tmp_path / "run", name)
    interactions, inputs = small.read(data, name)
    stored, _ = read_item_weights(tmp_path / "run/model.safetensors", 30)
    fresh = small.settings(name).solve(inputs, CPU)
    assert type(stored.matrix) is type(fresh.matrix) and np.array_equal(dense(stored), dense(fresh))
    scores = stored.scores(interactions.matrix("train"))(torch.tensor([3, 0]))
    rows = interactions.matrix("train").toarray()[[3, 0]]
    np.testing.assert_allclose(scores.numpy(), rows @ dense(fresh), rtol=1e-5, atol=1e-7)


def test_files_that_are_no_weights_of_these_items_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such file"):
        read_item_weights(path, 3)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged \(not a safetensors file"):
        read_item_weights(path, 3)
    sparse = {"offsets": np.array([0, 1, 1, 1]), "columns": np.array([7]), "values": np.ones(1, np.float32)}
    wrong = {
        r"holds weights \[2, 2\], not the weights of 3 items": {"weights": np.zeros((2, 2), np.float32)},
        r"holds users \[3, 1\]": {"users": np.zeros((3, 1), np.float32)},
        "not rows of weights": sparse,
        "a weight is NaN or infinite": {"weights": np.full((3, 3), np.nan, np.float32)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            read_item_weights(path, 3)
    save_file(sparse | {"columns": np.array([2])}, path)
    assert dense(read_item_weights(path, 3)[0]).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert set(load_file(path)) == {"offsets", "columns", "values"}


def test_equal_scores_of_weights_rank_by_lower_item(tmp_path):
    (tmp_path / "data").mkdir()
    data = prepared(tmp_path / "data")
    save_file({"weights": np.zeros((30, 30), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "run/model.safetensors")
    _, lists = small.scored(data, tmp_path / "run", "ease", k=5)
    interactions, _ = small.read(data, "ease")
    seen = interactions.matrix("train").toarray() > 0
    for user, items in lists.items():
        row = int(user.removeprefix("user"))
        expected = oracle.ranked(np.zeros(30), set(np.flatnonzero(seen[row])), 5)
        assert items == [f"item{i}" for i in expected]
