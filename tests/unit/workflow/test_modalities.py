"""Modalities with names of the user's own: several extractors of one kind, their weights, and unchanged keys."""

import copy
from typing import Any

import pytest
from checkout import SMALL

from cm3.common.errors import UserError
from workflow.plan import runs
from workflow.plan.config import Config, load_config


def shop(modalities: dict[str, str], **model: Any) -> Config:
    config = copy.deepcopy(SMALL)
    config["experiments"]["shop"]["modalities"] = modalities
    config["extractors"]["other-looks"] = config["extractors"]["looks"]
    config["experiments"]["shop"]["model"] = {**config["experiments"]["shop"].get("model", {}), **model}
    return load_config(config)


def test_two_extractors_of_one_kind_are_used_together():
    config = shop({"text": "words", "clip": "looks", "dino": "other-looks"})
    paths = runs.features_of(config, config.experiments["shop"])
    assert list(paths) == ["text", "clip", "dino"] and len(set(paths.values())) == 3
    assert paths["clip"].startswith("processed/shop/features/image/looks-")
    plain = shop({"text": "words", "image": "looks"})
    assert runs.features_of(plain, plain.experiments["shop"])["image"] == paths["clip"]


@pytest.mark.parametrize(
    ("modalities", "weights"),
    [
        ({"title": "words", "clip": "looks", "dino": "other-looks"}, {"title": 0.9, "clip": 0.05, "dino": 0.05}),
        ({"clip": "looks", "dino": "other-looks"}, {"clip": 0.5, "dino": 0.5}),
        ({"text": "words", "image": "looks", "dino": "other-looks"}, {"text": 0.9, "image": 0.05, "dino": 0.05}),
        ({"text": "words", "image": "looks"}, None),
    ],
)
def test_default_weights_follow_the_kind(modalities: dict[str, str], weights: dict[str, float] | None):
    found: Any = shop(modalities).experiments["shop"].model
    assert found.modality_weights == (weights and pytest.approx(weights))


def test_given_weights_are_used():
    model: Any = (
        shop({"title": "words", "clip": "looks"}, modality_weights={"title": 1.0, "clip": 3.0})
        .experiments["shop"]
        .model
    )
    assert model.modality_weights == {"title": 1.0, "clip": 3.0}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("text", "this extractor is of modality 'image'.*words; or give the modality a name of your own"),
        ("caption", "this extractor is of modality 'image'; of modality 'caption' there are: none"),
        ("fused", "not a name of a modality"),
        ("a/b", "not a name of a modality"),
    ],
)
def test_a_misleading_name_is_an_error(name: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        shop({name: "looks"})
