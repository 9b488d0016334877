"""Batches of training pairs, negative items, and mixing parameters."""

import numpy as np
import pytest
import torch

from cm3.model import sampling
from cm3.model.sampling import Sampler, mixing_parameters


def sampler(
    negatives: str = "negative", seed: int = 3, batch_size: int = 64, dedup_pairs: bool = False
) -> tuple[Sampler, np.ndarray]:
    rng = np.random.default_rng(0)
    seen = rng.random((50, 20)) < 0.5
    users, items = (torch.from_numpy(x) for x in np.nonzero(seen))
    made = Sampler(
        users, items, 20, batch_size=batch_size, negative_sampling=negatives, dedup_pairs=dedup_pairs, seed=seed
    )
    return made, seen


def test_an_epoch_is_every_pair_once_with_an_unseen_item():
    chosen, seen = sampler()
    batches = list(chosen.epoch(1))
    assert len(batches) == chosen.n_batches
    assert [len(b.users) for b in batches[:-1]] == [64] * (len(batches) - 1)
    users, items = (torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("users", "items"))
    pairs = sorted(zip(users.tolist(), items.tolist(), strict=True))
    assert pairs == list(zip(*map(list, np.nonzero(seen)), strict=True))
    assert not seen[users, torch.cat([b.counted_negatives.ids for b in batches]).numpy()].any()


def test_counted_ids_are_those_of_the_batch():
    repeated, gathered = list(sampler()[0].epoch(1)), list(sampler(dedup_pairs=True)[0].epoch(1))
    for a, b in zip(repeated, gathered, strict=True):
        assert torch.equal(a.users, b.users) and torch.equal(a.items, b.items) and a.counted_users.counts is None
        for one, other in ((a.counted_users, b.counted_users), (a.counted_negatives, b.counted_negatives)):
            ids, counts = np.unique(one.ids.numpy(), return_counts=True)
            assert other.ids.tolist() == ids.tolist() and other.counts.tolist() == counts.tolist()


def test_negatives_are_uniform_over_the_unseen():
    chosen, seen = sampler(batch_size=10_000)
    counts = np.zeros(seen.shape)
    for epoch in range(1, 200):
        (whole,) = chosen.epoch(epoch)
        np.add.at(counts, (whole.users.numpy(), whole.counted_negatives.ids.numpy()), 1)
    expected = np.where(seen, 0, (seen.sum(1) * 199 / (~seen).sum(1))[:, None])
    variance = expected * (1 - 1 / (~seen).sum(1))[:, None]
    deviation = (counts - expected)[~seen] ** 2 / variance[~seen]
    assert 0.8 < deviation.mean() < 1.2  # chi-square per cell of about 500


def test_positive_and_uniform_sampling():
    (positive,) = sampler("positive", batch_size=10_000)[0].epoch(1)
    assert torch.equal(positive.counted_negatives.ids, positive.items)
    chosen, seen = sampler("uniform", batch_size=10_000)
    (uniform,) = chosen.epoch(1)
    assert seen[uniform.users.numpy(), uniform.counted_negatives.ids.numpy()].any()
    assert set(uniform.counted_negatives.ids.tolist()) == set(range(20))


def test_epochs_differ_and_repeat_by_seed_from_any_batch():
    chosen, _ = sampler()
    whole = list(chosen.epoch(2))
    for first in (0, 3, len(whole)):
        rest = list(chosen.epoch(2, first))
        assert len(rest) == len(whole) - first
        for a, b in zip(whole[first:], rest, strict=True):
            assert torch.equal(a.users, b.users) and torch.equal(a.counted_negatives.ids, b.counted_negatives.ids)
    assert not torch.equal(next(chosen.epoch(3)).users, whole[0].users)
    assert not torch.equal(next(sampler(seed=4)[0].epoch(2)).users, whole[0].users)


@pytest.mark.parametrize("negatives", ["negative", "positive", "uniform"])
def test_indices_of_either_type_give_the_same_batches(monkeypatch, negatives):
    monkeypatch.setattr(sampling, "CPU_COUNTED_AT_ONCE", 150)  # two batches at a time
    made, _ = sampler(negatives, dedup_pairs=True)
    narrow = Sampler(
        made.users.int(), made.items.int(), 20, batch_size=64, negative_sampling=negatives, dedup_pairs=True, seed=3
    )
    for a, b in zip(made.epoch(1), narrow.epoch(1), strict=True):
        for name in ("users", "items", "negatives"):
            assert getattr(b, name).dtype == torch.int64 and torch.equal(getattr(a, name), getattr(b, name))


def test_a_user_with_every_item_has_no_negative():
    with pytest.raises(ValueError, match="user 1 has interacted with all 3 items"):
        users, items = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
        Sampler(users, items, 3, batch_size=4, negative_sampling="negative", dedup_pairs=True, seed=0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_mixing_parameters_are_beta_and_leave_the_global_generator_alone(alpha):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    t = mixing_parameters(alpha, 20_000, torch.device("cpu"), 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(t, mixing_parameters(alpha, 20_000, torch.device("cpu"), 7))
    assert float(t.min()) >= 0 and float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.005)


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.009, 0.001])
def test_small_alphas_give_values_near_both_ends(alpha):
    """Two gamma variates that underflow would give 0.5."""
    t = mixing_parameters(alpha, 200_000, torch.device("cpu"), 1)
    assert t.dtype == torch.float32 and bool(((t >= 0) & (t <= 1)).all())
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.double().var()) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.02)
    assert float(((t > 0.4) & (t < 0.6)).double().mean()) == pytest.approx(0.405 * alpha, abs=1.5e-3)
    assert torch.equal(t, mixing_parameters(alpha, 200_000, torch.device("cpu"), 1))


def test_ordinary_alphas_give_the_draws_of_torch_on_the_cpu():
    torch.manual_seed(5)
    shape = torch.full((100,), 0.5)
    expected = torch.distributions.Beta(shape, shape).sample()
    assert torch.equal(mixing_parameters(0.5, 100, torch.device("cpu"), 5), expected)
