"""Golden outputs of the baselines: another result for the same settings and inputs needs another version."""

import baseline_shop as small
import pytest
from golden import check_golden, summary
from safetensors.numpy import load_file
from training_shop import one_thread, prepared  # noqa: F401


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    missing = {"text": [3, 11], "image": [5]}
    return prepared(tmp_path_factory.mktemp("shop"), n_users=60, n_items=40, per_user=8, missing=missing)


@pytest.mark.parametrize("name", small.BASELINES)
def test_a_baseline_gives_its_golden_output(shop, tmp_path, name):
    facts = small.fit(shop, tmp_path / "run", name, {"epochs": 3, "patience": 5})
    tensors = load_file(tmp_path / "run/model.safetensors")
    outputs = {
        "facts": {key: facts[key] for key in ("best_valid", "best_epoch", "epochs", "parameters", "modality_weights")},
        "loss": facts["best_loss"],
        "model": {key: summary(values) for key, values in sorted(tensors.items())},
    }
    check_golden(f"model-{name}", small.BASELINES[name].version, outputs)
