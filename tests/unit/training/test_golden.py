"""Golden outputs of CM3 and of its training stage: another result for the same settings and inputs needs another version."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from golden import check_golden, summary
from safetensors.numpy import load_file
from training_shop import OUTPUTS, history, one_thread, prepared, run, shop  # noqa: F401

from cm3.common.stages import STAGES
from cm3.config import Model
from cm3.model.fused_slerp import fused_slerp
from cm3.model.fusion import reference_slerp, slerp

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "official": (Model.presets["official"]["model"], Model.presets["official"]["training"]),
    "fused": ({"slerp": "fused", "min_sim": -0.5, "max_sim": 0.6}, {}),
    "layers": ({"n_ui_layers": 2, "n_mm_layers": 2, "gamma": 0.5, "max_sim": 0.8, "alpha": 0.1}, {}),
    "positives": ({"dedup_pairs": False, "uniformity_items": "positive", "detach_similarity": True}, {}),
    "ablations": ({"fusion": "concat", "calibration": False, "uniformity_items": "uniform", "missing": "zero"}, {}),
}
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "batches_per_step": 2,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "weight_decay": 1e-4,
        "clip_norm": 0.3,
        "validate_every": 2,
        "monitor": "ndcg@10",
    },
}


@pytest.fixture(scope="module")
def sparse_shop(tmp_path_factory):
    """Three modalities, two of which lack vectors."""
    missing = {"text": [3, 11], "caption": [5]}
    return prepared(tmp_path_factory.mktemp("shop"), modalities=("text", "image", "caption"), missing=missing)


# Of the model and of the stage: a new version of either makes new results.
VERSION = 100 * (Model.version or 0) + STAGES["train"].version


def outputs(folder, facts: dict[str, Any]) -> dict[str, Any]:
    """The history, the facts and summaries of parameters and embeddings of a run in `folder`."""
    files = dict(zip(("model", "history", "users", "items"), OUTPUTS, strict=True))
    vectors = {}
    for kind in ("users", "items"):
        column = pq.read_table(folder / files[kind]).column("embedding").combine_chunks()
        vectors[kind] = summary(column.flatten().to_numpy().reshape(len(column), -1))
    return {
        "history": [{key: float(value) for key, value in row.items() if value} for row in history(folder)],
        "facts": {key: facts[key] for key in ("best_valid", "best_epoch", "epochs", "parameters", "modality_weights")},
        "model": {key: summary(values) for key, values in sorted(load_file(folder / files["model"]).items())},
        "embeddings": vectors,
    }


@pytest.mark.parametrize("name", MODELS)
def test_cm3_gives_its_golden_output(sparse_shop, tmp_path, name):
    model, training = MODELS[name]
    modalities = ("text", "image", "caption")
    facts = run(sparse_shop, tmp_path, modalities, model=model, training={"epochs": 3, **training})
    check_golden(f"model-cm3-{name}", VERSION, outputs(tmp_path, facts))


@pytest.mark.parametrize("name", LOOPS)
def test_the_stage_gives_its_golden_output(shop, tmp_path, name):
    facts = run(shop, tmp_path, training={"epochs": 4, **LOOPS[name]})
    check_golden(f"train-{name}", VERSION, outputs(tmp_path, facts))


@pytest.mark.parametrize("interpolate", [slerp, fused_slerp, reference_slerp], ids=lambda function: function.__name__)
def test_interpolation_gives_its_golden_output(interpolate):
    rng = np.random.Generator(np.random.PCG64(3))
    a, side = (torch.from_numpy(rng.standard_normal((6, 5))) for _ in range(2))
    a = torch.nn.functional.normalize(a, dim=1)
    side = torch.nn.functional.normalize(side - (a * side).sum(1, keepdim=True) * a, dim=1)
    t, upstream = torch.from_numpy(rng.random(6)), torch.from_numpy(rng.standard_normal((6, 5)))
    outputs = {}
    for angle in (1e-7, 0.01, 0.8, 2.0, 3.1):
        ends = [a.clone().requires_grad_(), (np.cos(angle) * a + np.sin(angle) * side).requires_grad_()]
        # Of unit length again, so that what a formula adds along a vector itself does not count.
        point = interpolate(*(torch.nn.functional.normalize(end, dim=1) for end in ends), t)
        (point * upstream).sum().backward()
        parts = {"point": point.detach(), "gradient of a": ends[0].grad, "gradient of b": ends[1].grad}
        if interpolate is not reference_slerp or angle > 1e-3:
            outputs[str(angle)] = {key: summary(value) for key, value in parts.items()}
    check_golden(f"cm3-{interpolate.__name__}", Model.version, outputs, tolerance=1e-5)
