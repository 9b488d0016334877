"""Which pairs are tested, what counts as better, how often chance alone does, and the sentences made of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.reports.analysis.findings import main_experiment, sentences
from cm3.reports.analysis.pairs import best_of, compare_pairs, find_pair, pairs_to_test
from cm3.reports.analysis.statistics import bootstrap_means
from cm3.reports.pages.study_page import _labels


def compared(per_user, by_seed=None, pairs=None, resamples=400, seed=0):
    """Test (n, E, M) values of models a, b, c, ... in metrics m0, m1, ..."""
    names = [chr(97 + e) for e in range(per_user.shape[1])]
    metrics = [f"m{m}" for m in range(per_user.shape[2])]
    means = {
        name: {metric: [per_user[:, e, m].mean()] * 2 for m, metric in enumerate(metrics)}
        for e, name in enumerate(names)
    }
    drawn = bootstrap_means(per_user.reshape(len(per_user), -1), resamples, seed).reshape(-1, len(names), len(metrics))
    return compare_pairs(pairs or pairs_to_test(names, None, {}), names, metrics, per_user, drawn, by_seed or means)


def test_pairs_are_all_or_those_with_the_reference_and_the_controls():
    control_of = {"b": "a", "d": "c"}
    assert pairs_to_test("abc", None, control_of) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_to_test("abcd", "a", control_of) == [("b", "a"), ("c", "a"), ("d", "a"), ("c", "d")]
    assert pairs_to_test("a", None, {}) == []


def test_chance_alone_seldom_finds_a_difference():
    # Three equal models whose metrics are mostly 0, as recall is; two correlated metrics; 300 studies.
    rng, false = np.random.default_rng(0), 0
    for study in range(300):
        hits = rng.random((150, 3)) < 0.3 * rng.random((150, 1)) * 2
        values = np.stack([hits, hits / rng.integers(1, 6, (150, 1))], axis=2)
        false += any(row["significant"] for row in compared(values, resamples=200, seed=study))
    # At most 5 % of studies may err; 300 of them have a standard deviation of 1.3 %.
    assert false / 300 < 0.05 + 3 * 0.013


def test_a_real_difference_is_found_nearly_always():
    rng, found = np.random.default_rng(1), 0
    for study in range(60):
        user = rng.random(400)
        values = (rng.random((400, 2)) < np.column_stack([0.2 + 0.3 * user, 0.05 + 0.3 * user])).astype(float)[
            ..., None
        ]
        found += compared(values, resamples=200, seed=study)[0]["better"] == "a"
    # The expected z is about 5.
    assert found >= 57


def test_ranks_that_lean_against_the_mean_are_no_difference():
    # Model a is a little better for most users and much worse for few: mean and ranks disagree.
    differences = np.concatenate([np.full(800, 0.01), np.full(200, -0.2)]) + np.random.default_rng(0).normal(
        0, 1e-3, 1000
    )
    values = np.column_stack([differences, np.zeros(1000)])[..., None]
    (row,) = compared(values)
    assert row["p_holm"] < 0.05 and row["high"] < 0 and row["users_a"] > row["users_b"]
    assert row["better"] is None and row["significant"] is False


@given(st.integers(0, 10_000))
def test_a_pair_seen_from_the_other_side_is_its_mirror(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (40, 2, 1)) / 2.0
    by_seed = {name: {"m0": rng.random(3).tolist()} for name in "ab"}
    turned = {"a": by_seed["b"], "b": by_seed["a"]}
    row = find_pair(compared(values, by_seed, resamples=100), "b", "a", "m0")
    (mirror,) = compared(values[:, ::-1], turned, resamples=100)
    for key in ("mean_a", "mean_b", "difference", "low", "high", "p", "p_holm", "users_a", "users_b"):
        assert row[key] == pytest.approx(mirror[key], abs=1e-12), key
    assert row["better"] == mirror["better"]
    for key in ("low", "high", "sd"):
        assert row["seeds"][key] == pytest.approx(mirror["seeds"][key], abs=1e-12), key
    assert row["seeds"]["exceeds"] == mirror["seeds"]["exceeds"]


def pair(a, b, better=None, **given):
    difference = given.pop("difference", 0.02)
    told = {
        "a": a,
        "b": b,
        "metric": "recall@20",
        "mean_a": 0.1 + difference,
        "mean_b": 0.1,
        "difference": difference,
        "low": 0.01,
        "high": 0.03,
        "p": 0.0001,
        "p_holm": 0.0003,
        "significant": better is not None,
        "better": better,
        "users_a": 5,
        "users_b": 3,
        "users_equal": 2,
        "seeds": {"low": 0.01, "high": 0.03, "sd": 0.001, "exceeds": True},
    }
    return told | given


NONE = {"low": -0.01, "high": 0.01, "p_holm": 0.7, "difference": 0.0001}


def test_the_best_is_marked_only_if_it_beats_every_other():
    means = {"a": 0.3, "b": 0.2, "c": 0.1}

    def best(*rows):
        return best_of("abc", "recall@20", means, rows)

    assert best(pair("a", "b", "a"), pair("c", "a", "b"))["marked"] is True
    assert best(pair("a", "b"), pair("a", "c", "a")) == {
        "experiment": "a",
        "next": "b",
        "marked": False,
        "reason": "a is not significantly better than b",
    }
    assert best(pair("a", "b", "a"), pair("a", "c"))["reason"] == "a is not significantly better than c"
    assert best(pair("a", "c", "a"))["reason"] == "a was not tested against b"
    assert best_of("a", "recall@20", means, [])["marked"] is False


def experiment(model="cm3", modalities=("text", "image"), **given):
    told = {
        "model": model,
        "modalities": dict.fromkeys(modalities, "x"),
        "control": None,
        "control_of": None,
        "warnings": [],
        "n_seeds": 5,
        "deterministic": False,
        "settings": {},
        "point": {},
        "grid": [{}],
    }
    return told | given


def said(experiments, pairs, kind):
    return [word for word in sentences(experiments, pairs, "recall@20", 6) if word["kind"] == kind]


CONTROL = {"text": "gaussian", "image": "gaussian"}


def test_content_that_helps_hurts_or_does_nothing_is_said_so():
    experiments = {"hm": experiment(), "noise": experiment(control=CONTROL, control_of="hm")}
    (gain,) = said(experiments, [pair("hm", "noise", "a")], "control")
    assert gain["text"] == (
        "hm gains from its content: recall@20 is 0.1200, and 0.1000 with Gaussian noise of equal norms in place of all "
        "its features (noise); difference 0.0200, 95 % interval 0.0100 to 0.0300, p < 0.001 after Holm's correction "
        "over 6 tests."
    )
    assert (gain["experiment"], gain["against"], gain["verdict"]) == ("hm", "noise", "gain")
    (none,) = said(experiments, [pair("hm", "noise", **NONE)], "control")
    assert none["text"].startswith("hm gains nothing measurable from its content: ") and "p = 0.700" in none["text"]
    assert none["verdict"] == "none"
    (unsure,) = said(experiments, [pair("hm", "noise", p_holm=0.2)], "control")
    assert unsure["text"].startswith("No gain of hm from its content is shown: ") and unsure["verdict"] == "none"
    # The pair may stand the other way round.
    (loss,) = said(experiments, [pair("noise", "hm", "a")], "control")
    assert loss["text"].startswith("hm loses by its content: recall@20 is 0.1000, and 0.1200 with")
    assert "difference -0.0200, 95 % interval -0.0300 to -0.0100" in loss["text"] and loss["verdict"] == "loss"


def test_a_control_of_one_modality_speaks_of_that_one():
    shuffled = {"hm": experiment(), "c": experiment(control={"image": "shuffled"}, control_of="hm")}
    (word,) = said(shuffled, [pair("hm", "c", "a")], "control")
    assert word["text"].startswith("hm gains from its image features: ")
    assert "with the features of other items (rows shuffled) in place of its image features (c)" in word["text"]
    mixed = {"hm": experiment(), "c": experiment(control={"image": "shuffled", "text": "constant"}, control_of="hm")}
    (word,) = said(mixed, [pair("hm", "c", "a")], "control")
    assert "in place of its image features and one constant vector in place of its text features" in word["text"]


def test_models_that_do_not_beat_simple_ones_are_named():
    experiments = {
        "hm": experiment(),
        "noise": experiment(control=CONTROL, control_of="hm"),
        "gcn": experiment("lightgcn", ()),
        "pop": experiment("mostpop", ()),
        "knn": experiment("itemknn", ()),
    }
    pairs = [
        pair("hm", "gcn", **NONE),
        pair("hm", "pop", "a"),
        pair("hm", "knn", "b", difference=-0.02, low=-0.03, high=-0.01),
        pair("pop", "gcn", **NONE),
        pair("gcn", "knn", **NONE),
        pair("noise", "pop", **NONE),
    ]
    words = said(experiments, pairs, "baseline")
    assert [(w["experiment"], w["against"], w["verdict"]) for w in words] == [
        ("hm", "gcn", "none"),
        ("hm", "knn", "loss"),
        ("gcn", "pop", "none"),
    ]
    assert words[0]["text"].startswith("hm does not significantly beat gcn, which uses no content: recall@20 is 0.1001")
    assert words[1]["text"].startswith("hm is significantly worse than knn, which uses no content: ")
    assert words[2]["text"].startswith("gcn does not significantly beat pop, which recommends the most popular items: ")


def test_a_re_ranking_is_no_model_without_content():
    reranking = experiment("rerank", (), settings={"model.of": "hm", "model.by": ["ease"]})
    experiments = {"hm": experiment(), "again": reranking, "ease": experiment("ease", ())}
    pairs = [
        pair("hm", "again", "b", difference=-0.02, low=-0.03, high=-0.01),
        pair("again", "ease", **NONE),
        pair("hm", "ease", "a"),
    ]
    texts = [word["text"] for word in said(experiments, pairs, "baseline")]
    assert texts[0].startswith("hm is significantly worse than again, which re-ranks the lists of hm: ")
    assert texts[1].startswith("again does not significantly beat ease, which uses no content: ")
    assert len(texts) == 2


def test_a_difference_within_the_noise_of_seeds_is_named():
    experiments = {"hm": experiment(), "gcn": experiment("lightgcn", ())}
    noisy = {"low": -0.01, "high": 0.05, "sd": 0.02, "exceeds": False}
    (word,) = said(experiments, [pair("gcn", "hm", "b", difference=-0.02, seeds=noisy)], "seeds")
    assert (word["experiment"], word["against"]) == ("hm", "gcn")
    assert "interval of the difference in recall@20 is -0.0500 to 0.0100" in word["text"]
    assert said(experiments, [pair("hm", "gcn", "a")], "seeds") == []
    assert said(experiments, [pair("hm", "gcn", seeds=noisy)], "seeds") == [], "nothing was claimed"


def test_models_that_are_beaten_are_named_in_one_sentence():
    experiments = {
        "hm": experiment(),
        "noise": experiment(control=CONTROL, control_of="hm"),
        "ease": experiment("ease", ()),
        "pop": experiment("mostpop", ()),
        "bm3": experiment("bm3"),
    }
    ease = pair("hm", "ease", "a")
    pairs = [ease, pair("pop", "hm", "b", difference=-0.1, mean_a=0.02, low=-0.2, high=-0.05), pair("hm", "noise", "a")]
    (word,) = said(experiments, [*pairs, pair("hm", "bm3", **NONE)], "ahead")
    assert word["text"] == (
        "hm is ahead of ease and pop; of ease, the closest, by 0.0200 recall@20 (+20 %): 0.1200 against 0.1000; "
        "95 % interval 0.0100 to 0.0300, p < 0.001 after Holm's correction over 6 tests."
    )
    assert (word["experiment"], word["against"], word["verdict"]) == ("hm", "ease", "gain")
    (word,) = said(experiments, [ease], "ahead")
    assert word["text"].startswith("hm is ahead of ease by 0.0200 recall@20 (+20 %): 0.1200 against 0.1000; ")
    assert said(experiments, [pair("hm", "ease", **NONE)], "ahead") == [], "only what is significant is claimed"
    (word,) = said(experiments, [pair("hm", "bm3", **NONE)], "baseline")
    assert word["text"].startswith("hm does not significantly beat bm3: recall@20 is")


def test_ablations_are_named_in_one_sentence_by_what_they_change():
    whole = {"model.fusion": "bezier", "model.gamma": 0.9, "model.calibration": True}
    experiments = {
        "hm": experiment(settings=whole),
        "hm-text": experiment(modalities=("text",), settings=whole),
        "hm-plain": experiment(settings=whole | {"model.fusion": "mean", "model.calibration": False}),
        "hm-tuned": experiment(settings=whole, point={"model.gamma": 0.5}),
        "noise": experiment(settings=whole, control=CONTROL, control_of="hm"),
        "ease": experiment("ease", ()),
    }
    pairs = [
        pair("hm-text", "hm", "b", difference=-0.003, low=-0.004, high=-0.002),
        pair("hm", "hm-plain", **NONE),
        pair("hm-tuned", "hm", **NONE | {"mean_b": 0.0}),
        pair("noise", "hm", "b"),
    ]
    (word,) = said(experiments, pairs, "ablation")
    assert word["text"] == (
        "Changes in recall@20 against hm: without image (hm-text) -3.0 %; fusion = mean, calibration = false (hm-plain) "
        "-0.1 %, not significant; hm-tuned by 0.0001, not significant."
    )
    assert said({"hm": experiment(), "ease": experiment("ease", ())}, [], "ablation") == []


def test_one_warning_names_all_experiments_that_it_is_about():
    experiments = {
        "hm": experiment(n_seeds=1, warnings=["features are mixed"]),
        "hm-text": experiment(n_seeds=1, warnings=["features are mixed"]),
        "ease": experiment("ease", (), n_seeds=1, deterministic=True),
    }
    words = said(experiments, [], "warning")
    assert [word["text"] for word in words] == [
        "hm, hm-text: features are mixed.",
        "hm and hm-text have one seed only: the variation between trainings is unknown.",
    ], "a closed form needs no seeds"


def test_the_main_experiment_is_the_reference_or_the_first_with_content():
    experiments = {
        "pop": experiment("mostpop", ()),
        "noise": experiment(control=CONTROL, control_of="hm"),
        "hm": experiment(),
        "bm3": experiment("bm3"),
    }
    assert main_experiment(experiments, None) == "hm"
    assert main_experiment(experiments, "bm3") == "bm3"
    assert main_experiment({"pop": experiment("mostpop", ())}, None) == "pop"


def test_warnings_come_first():
    experiments = {
        "hm": experiment(warnings=["these results are optimistic"], grid=[{}, {}], n_seeds=1),
        "noise": experiment(control=CONTROL, control_of="hm"),
    }
    words = sentences(experiments, [pair("hm", "noise", "a")], "recall@20", 1)
    assert [word["kind"] for word in words] == ["warning", "warning", "warning", "control"]
    assert words[0]["text"] == "hm: these results are optimistic."
    assert words[1]["text"].startswith("hm has one seed only")
    assert words[2]["text"].startswith("hm is the best of 2 grid points and its control noise of 1")
    assert "Holm" not in words[3]["text"], "one test needs no correction"


def test_the_line_below_a_name_tells_a_control_and_lists_without_brackets():
    settings = {"model.of": "hm", "model.by": ["hm-ease", "hm-content"]}
    other = {"model.of": "noise", "model.by": ["noise-ease", "noise-content"]}
    study = {
        "main": "best",
        "reference": "best",
        "experiments": {
            "best": experiment("rerank", settings=settings),
            "noise": experiment(control=CONTROL),
            "control": experiment(control=CONTROL, control_of="hm"),
            "noise-best": experiment("rerank", settings=other, control=CONTROL),
        },
    }
    assert _labels(study, "noise") == ["CM3: text, image", "control: gaussian"]
    assert _labels(study, "control") == ["control of hm"]
    assert _labels(study, "noise-best") == ["of = noise", "by = noise-ease, noise-content", "control: gaussian"]
