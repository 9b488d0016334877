"""Experiments that are like another one: what they take over, and what is refused."""

import re
from typing import Any

import pytest
from checkout import SMALL
from study_config import checked, config, refused

from cm3.baselines.bpr_mf import BPRMF
from workflow.plan.config import load_config
from workflow.plan.runs import selected_run


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"like": "shp"}, r"experiments\.odd\.like = 'shp': no such name \(did you mean 'shop'\?\)"),
        ({"like": "odd"}, r"experiments\.odd\.like = 'odd': experiments are like each other in a circle: odd, odd"),
        ({"like": "shop", "model": {"name": "lightgc"}}, r"model\.name = 'lightgc'.*did you mean 'lightgcn'"),
        ({"like": "lightgcn", "model": {"gamma": 1}}, r"experiments\.odd\.model\.gamma: unknown key"),
        ({"like": "lightgcn", "modalities": {"text": "words"}}, r"modalities = .*lightgcn reads no features"),
        (
            {"dataset": "shop", "model": {"name": "vbpr"}},
            r"odd\.modalities = \{\}: vbpr reads features and needs at least",
        ),
        ({"like": "lightgcn", "control": "gaussian"}, r"odd\.control = 'gaussian': there are no features to replace"),
        ({"like": "shop", "control": "gausian"}, r"odd\.control = 'gausian': no control.*mean 'gaussian'"),
        ({"like": "shop", "control": {"text": "shufled"}}, r"odd\.control = .*no control 'shufled'.*mean 'shuffled'"),
        ({"like": "shop", "control": {"imge": "constant"}}, r"odd\.control\.imge: .*did you mean 'image'"),
        (
            {"like": "ease", "training": {"lr": 0.1}},
            r"training\.lr: ease is computed in closed form and does not train",
        ),
        (
            {"like": "lightgcn", "training": {"processes": 2}},
            r"odd\.training\.processes: not supported by lightgcn, only by cm3",
        ),
        (
            {"like": "ease", "evaluation": {"score": "cosine"}},
            r"odd\.evaluation\.score = 'cosine': ease exports item weights",
        ),
        (
            {"like": "lightgcn", "preset": "official"},
            r"preset = 'official': a preset of cm3, but the model is lightgcn",
        ),
    ],
)
def test_a_wrong_variant_is_refused(section: dict[str, Any], message: str):
    assert re.search(message, refused(config(odd=section)))


def test_like_takes_over_what_is_not_said_again():
    whole = config(
        wide={
            "like": "shop",
            "model": {"embedding_dim": 32},
            "training": {"lr": 0.1, "precision": "bfloat16"},
            "modalities": {"image": "coarse"},
        },
        wider={"like": "wide", "model": {"hidden_factor": 2}},
        mf={"like": "wide", "model": {"name": "bpr-mf"}},
        popular={"like": "wide", "model": {"name": "mostpop"}, "training": {"monitor": "ndcg@5"}},
    )
    found = load_config(whole).experiments
    assert found["wider"].training.precision == "bfloat16" and found["mf"].training.precision == "float32"
    assert found["wider"].model.embedding_dim == 32
    assert found["wider"].model.hidden_factor == 2
    assert found["wider"].modalities == {"image": "coarse"}
    assert (found["wider"].training.lr, found["wider"].training.epochs) == (0.1, 4)
    assert found["wider"].evaluation.ks == [5, 10]
    assert found["mf"].modalities == {}
    assert found["mf"].model == BPRMF()
    assert found["mf"].training.lr == 0.1
    assert found["popular"].training_identity() == {"monitor": "ndcg@5"}


def test_automatic_batches_per_step_are_the_default_of_cm3_alone_and_have_the_key_of_the_earlier_default():
    whole = config(
        usual={"like": "shop"},
        one={"like": "shop", "training": {"batches_per_step": 1}},
        four={"like": "shop", "training": {"batches_per_step": 4}},
        paper={"like": "shop", "preset": "official"},
        mf={"like": "shop", "model": {"name": "bpr-mf"}},
    )
    found = load_config(whole).experiments
    chosen = {name: found[name].training.batches_per_step for name in ("usual", "one", "four", "paper", "mf")}
    assert chosen == {"usual": "auto", "one": 1, "four": 4, "paper": 1, "mf": 1}
    in_keys = {name: found[name].training_identity()["batches_per_step"] for name in chosen}
    assert in_keys == {"usual": 1, "one": "1", "four": 4, "paper": 1, "mf": 1}


def test_bfloat16_has_another_key_than_when_it_was_that_of_the_features_alone():
    found = load_config(config(rough={"like": "shop", "training": {"precision": "bfloat16"}})).experiments["rough"]
    assert found.training_settings()["precision"] == "bfloat16"
    assert found.training_identity()["precision"] == "bfloat16 of features and pairs"


def test_a_model_has_a_patience_of_its_own():
    whole = config(
        hasty={"like": "shop", "training": {"patience": 3}},
        hastier={"like": "hasty", "control": "gaussian"},
        mf={"like": "hasty", "model": {"name": "bpr-mf"}},
        told={"like": "hasty", "model": {"name": "bpr-mf"}, "training": {"patience": 4}},
        told_too={"like": "told", "model": {"embedding_dim": 8}},
    )
    found = {name: one.training.patience for name, one in load_config(whole).experiments.items()}
    expected = {"hasty": 3, "hastier": 3, "mf": 20, "told": 4, "told_too": 4}
    assert {name: found[name] for name in expected} == expected


def test_a_variant_that_says_all_again_is_the_same_run():
    said = {**SMALL["experiments"]["shop"]}
    same = checked(again=said, short={"like": "shop"})
    assert selected_run(same, "again") == selected_run(same, "short") == selected_run(same, "shop")
