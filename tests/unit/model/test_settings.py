"""Settings of CM3: presets, limits and weights of modalities."""

import pytest

from cm3.common.errors import UserError
from cm3.config import Evaluation, Model, Training, modality_weights, settings


def test_official_preset_sets_every_switch_of_the_reference():
    official = settings("official", {}, {}, {}, "x")
    assert (official.model.dedup_pairs, official.model.detach_similarity) == (False, False)
    assert official.model.uniformity_items == "negative" and official.training.weight_decay == 0
    assert official.training.select_on == "test" and official.training.eval_embeddings == "last_batch"
    assert official.training.round_valid == 4
    assert official.training.patience == 11  # the reference stops one validation later than its setting of 10 says
    assert official.evaluation.score == "dot" and official.evaluation.mask == "train"


def test_user_values_stand_above_the_preset():
    found = settings("official", {"gamma": 0.5, "dedup_pairs": True}, {"patience": 3}, {"ks": [20, 5]}, "x")
    assert (found.model.gamma, found.model.dedup_pairs, found.training.patience) == (0.5, True, 3)
    assert found.evaluation.ks == [5, 20]


@pytest.mark.parametrize("preset", Model.presets)
def test_settings_survive_their_identity(preset):
    found = settings(preset, {}, {}, {}, "x")
    assert Model.model_validate(found.model.identity()) == found.model
    assert Training.model_validate({**found.training.identity(), **found.training.runtime()}) == found.training
    assert Evaluation.model_validate(found.evaluation.identity()) == found.evaluation
    assert not {"device", "checkpoint_seconds", "optimizer_state"} & set(found.training.identity())


@pytest.mark.parametrize(
    ("model", "training", "evaluation", "message"),
    [
        ({"dropout": 0.1}, {}, {}, r"x\.model\.dropout = 0\.1: dropout is not implemented"),
        ({"gama": 0.1}, {}, {}, r"x\.model\.gama: unknown key \(did you mean 'gamma'\?\)"),
        ({"min_sim": 0.9, "max_sim": 0.5}, {}, {}, r"min_sim 0\.9 is above max_sim 0\.5"),
        ({"alpha": 0}, {}, {}, r"x\.model\.alpha = 0"),
        ({"modality_weights": {"text": 0}}, {}, {}, "at least one modality"),
        ({"modality_weights": {"text": -1}}, {}, {}, r"x\.model\.modality_weights\.text = -1"),
        ({}, {"lr": "fast"}, {}, r"x\.training\.lr = 'fast'"),
        ({}, {"monitor": "accuracy"}, {}, r"x\.training\.monitor = 'accuracy'"),
        ({}, {"epochs": 1.5}, {}, r"x\.training\.epochs = 1\.5"),
        ({}, {}, {"ks": [5, 5]}, r"x\.evaluation\.ks = \[5, 5\]: duplicate cut-off in ks: 5"),
        ({}, {}, {"ks": []}, r"x\.evaluation\.ks"),
        ({}, {}, {"score": "euclid"}, r"x\.evaluation\.score = 'euclid'"),
    ],
)
def test_impossible_settings_are_refused_with_their_path(model, training, evaluation, message):
    with pytest.raises(UserError, match=message):
        settings("default", model, training, evaluation, "x")


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match=r"x\.preset = 'offical': unknown preset \(did you mean 'official'\?\)"):
        settings("offical", {}, {}, {}, "x")


@pytest.mark.parametrize(
    ("given", "modalities", "expected"),
    [
        (None, ["text", "image"], [0.9, 0.1]),
        (None, ["text", "image", "caption"], [0.45, 0.1, 0.45]),
        (None, ["image"], [1.0]),
        (None, ["text", "caption"], [0.5, 0.5]),
        ({"text": 3, "image": 1}, ["image", "text"], [0.25, 0.75]),
        ({"text": 1, "image": 0}, ["image", "text"], [0.0, 1.0]),
    ],
)
def test_modality_weights(given, modalities, expected):
    found = modality_weights(Model(modality_weights=given), modalities)
    assert list(found) == modalities
    assert list(found.values()) == pytest.approx(expected)


def test_modality_weights_must_name_the_modalities():
    with pytest.raises(UserError, match=r"e\.model\.modality_weights\.txt: .*did you mean 'text'"):
        modality_weights(Model(modality_weights={"txt": 1.0}), ["text"], "e.model")
    with pytest.raises(UserError, match="modality 'image' has no weight"):
        modality_weights(Model(modality_weights={"text": 1.0}), ["text", "image"])
