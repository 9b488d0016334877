"""Golden output of CM3's training: another result for the same settings and inputs needs another version."""

import pytest
from golden import check_golden, summary
from safetensors.numpy import load_file
from training_shop import one_thread, prepared, run  # noqa: F401

from cm3.common.stages import STAGES
from cm3.model_registry import spec_class


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    missing = {"text": [3, 11], "image": [5]}
    return prepared(tmp_path_factory.mktemp("shop"), n_users=60, n_items=40, per_user=8, missing=missing)


@pytest.mark.parametrize("variant", ["default", "three-layers", "official-losses", "fused-slerp"])
def test_training_gives_its_golden_output(shop, tmp_path, variant):
    model = {
        "default": {},
        "three-layers": {"n_ui_layers": 3, "n_mm_layers": 2, "gamma": 0.5, "max_sim": 0.8},
        "official-losses": {"dedup_pairs": False, "uniformity_items": "positive", "detach_similarity": True},
        "fused-slerp": {"slerp": "fused", "alpha": 0.1},
    }[variant]
    facts = run(shop, tmp_path / "run", model=model, training={"epochs": 3})
    outputs = {
        "facts": {key: facts[key] for key in ("best_valid", "best_epoch", "epochs", "parameters", "modality_weights")},
        "loss": facts["best_loss"],
        "model": {
            key: summary(values) for key, values in sorted(load_file(tmp_path / "run/model.safetensors").items())
        },
    }
    check_golden(f"train-{variant}", 100 * (spec_class("cm3").version or 0) + STAGES["train"].version, outputs)
