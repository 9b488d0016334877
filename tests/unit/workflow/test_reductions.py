"""Reductions: which features they concern, the names and keys of what depends on them, and what is refused."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import SMALL

from cm3.common.errors import UserError
from cm3.common.features import write_features
from cm3.common.keys import key_of
from workflow.overview import overview
from workflow.plan import comparison, features, mmrec, publish, runs
from workflow.plan.config import Config, load_config
from workflow.prune import unused, used_by

PCA16 = {"method": "pca", "dim": 16}


def config(reduce: Any = None, **experiments: Any) -> Config:
    """The small shop with a reduction of the extractor of its images, and further experiments."""
    whole = copy.deepcopy(SMALL)
    whole["extractors"]["looks"] |= {"reduce": reduce} if reduce else {}
    whole["experiments"] |= experiments
    return load_config(whole)


def paths(config: Config, name: str = "shop") -> dict[str, str]:
    return runs.train_inputs(config, name, runs.selected_run(config, name))


def test_reduced_features_and_their_graphs_have_names_of_their_own_and_the_extractor_keeps_its_key():
    plain, reduced = config(), config(PCA16)
    assert reduced.extractors["looks"].identity() == plain.extractors["looks"].identity()
    assert features.extract(reduced, "looks").identity == features.extract(plain, "looks").identity
    stem = paths(plain)["features.image"].removesuffix(".parquet")
    assert paths(reduced)["features.image"] == f"{stem}-pca16.parquet"
    assert Path(paths(reduced)["similarity.image"]).stem == f"{Path(stem).name}-pca16-k10"
    assert {k: v for k, v in paths(reduced).items() if not k.endswith("image")} == {
        k: v for k, v in paths(plain).items() if not k.endswith("image")
    }
    key = Path(stem).name.removeprefix("looks-")
    assert features.reduce_inputs(reduced, "shop", "looks", key, "pca16") == {"features": f"{stem}.parquet"}
    assert features.reduce(reduced, "pca16").spec == PCA16
    assert (
        features.similarity_inputs(reduced, "shop", "looks", key, "-pca16", "")["features"] == f"{stem}-pca16.parquet"
    )
    assert mmrec.vectors_inputs(reduced, "shop", "image")["features"] == f"{stem}-pca16.parquet"


def test_the_key_of_a_run_depends_on_the_reduction_and_not_on_where_it_is_written():
    own = {"like": "shop", "reduce": {"image": PCA16}}
    found = config(own=own, wider={"like": "shop", "reduce": {"image": {"method": "pca", "dim": 32}}})
    keys = {name: runs.selected_run(found, name) for name in ("shop", "own", "wider")}
    assert len(set(keys.values())) == 3
    assert keys["own"] == runs.selected_run(config(PCA16), "shop")
    assert keys["shop"] == runs.selected_run(config(PCA16, plain={"like": "shop", "reduce": {"image": None}}), "plain")
    assert found.experiments["shop"].reductions == {}


def test_the_reduction_of_a_captioner_is_of_the_vectors_of_its_captions():
    whole = copy.deepcopy(SMALL)
    sayer = {"modality": "caption", "backend": "openai-caption", "model": "m", "url": "http://127.0.0.1:9/v1"}
    whole["extractors"]["words"]["reduce"] = {"method": "pca", "dim": 64}
    whole["extractors"] |= {name: sayer | {"encoder": "words"} for name in ("sayer", "reduced")}
    whole["extractors"]["reduced"] = whole["extractors"]["reduced"] | {"reduce": PCA16}
    whole["experiments"]["shop"]["modalities"] = {"text": "words", "caption": "sayer", "said": "reduced"}
    found = load_config(whole)
    assert found.experiments["shop"].feature_names() == {
        "text": "words-pca64",
        "caption": "sayer",
        "said": "reduced-pca16",
    }
    own, other = (features.captions_path(found, "shop", name) for name in ("sayer", "reduced"))
    assert own.replace("sayer", "reduced") == other


def test_the_key_of_a_run_without_reductions_is_of_what_it_was_before_there_were_any():
    found = config()
    shop, dataset = found.experiments["shop"], found.datasets["shop"]
    words, looks = (features.features_identity(found, name) for name in ("words", "looks"))
    before = {
        "dataset": ["shop", dataset.generate_spec(), dataset.tables_spec(), dataset.split_spec()],
        "features": [["text", "words", words], ["image", "looks", looks]],
        "model": shop.model.identity(),
        "training": shop.training_identity(),
    }
    assert runs.selected_run(found, "shop") == key_of(before)


def test_a_control_replaces_the_reduced_features_and_is_the_control_of_their_experiment():
    noise = {"like": "reduced", "control": {"image": "gaussian"}}
    found = config(reduced={"like": "shop", "reduce": {"image": PCA16}}, noise=noise)
    path = paths(found, "noise")["features.image"]
    assert path == paths(found, "reduced")["features.image"].replace("-pca16", "-pca16-gaussian-42")
    key = Path(path).name.split("-")[1]
    replaced = features.control_inputs(found, "shop", "looks", key, "-pca16")["features"]
    assert replaced == paths(found, "reduced")["features.image"]
    assert features.similarity_inputs(found, "shop", "looks", key, "-pca16", "-gaussian-42")["features"] == path
    whole = copy.deepcopy(SMALL)
    whole["experiments"] |= {"reduced": {"like": "shop", "reduce": {"image": PCA16}}, "noise": noise}
    whole["studies"] = {"compared": {"experiments": ["shop", "reduced", "noise"]}}
    described = comparison.compare(load_config(whole), "compared").spec["experiments"]
    assert described["noise"]["control_of"] == "reduced"
    assert described["reduced"]["modalities"] == {"text": "words", "image": "looks-pca16"}


def test_results_state_the_reduction_and_those_without_one_are_as_before():
    plain, reduced = config(), config(PCA16)
    assert "reduce" not in publish.publish(plain, "shop").spec["config"]
    assert publish.publish(reduced, "shop").spec["config"]["reduce"] == {"image": PCA16}
    further = set(publish.publish_inputs(reduced, "shop")) - set(publish.publish_inputs(plain, "shop"))
    assert further == {"record.reduce.image"}
    assert "text words, image looks-pca16" in overview(reduced)


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"odd": {"like": "shop", "reduce": {"imge": PCA16}}}, r"odd\.reduce\.imge: .* no such modality.*mean 'image'"),
        ({"odd": {"like": "shop", "reduce": {"image": {"method": "pca", "dim": 0}}}}, r"odd\.reduce\.image\.dim = 0: "),
        (
            {"odd": {"like": "shop", "reduce": {"image": {"dims": 8}}}},
            r"odd\.reduce\.image\.dims: unknown key.*mean 'dim'",
        ),
        (
            {"odd": {"like": "shop", "reduce": {"image": {"method": "svd", "dim": 8}}}},
            r"image\.method = 'svd': .*'pca'",
        ),
    ],
)
def test_a_wrong_reduction_is_refused(sections: dict[str, Any], complaint: str):
    with pytest.raises(UserError) as refused:
        config(**sections)
    assert re.search(complaint, str(refused.value)), str(refused.value)


def test_a_dim_that_existing_features_do_not_have_is_refused_while_planning(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    found = config(PCA16)
    path = Path(features.features_path(found, "shop", "looks"))
    key = path.stem.removeprefix("looks-")
    write_features(path, [f"i{n}" for n in range(30)], np.ones((30, 20), np.float32), ["ok"] * 30, {})
    assert features.reduce_inputs(found, "shop", "looks", key, "pca16")
    for suffix, complaint in (
        ("pca20", "vectors of 20 numbers, which reduce.dim = 20"),
        ("pca400", "give a dim below 20"),
    ):
        with pytest.raises(UserError, match=complaint) as refused:
            features.reduce_inputs(found, "shop", "looks", key, suffix)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_models_without_content_do_not_inherit_a_reduction():
    found = config(
        reduced={"like": "shop", "reduce": {"image": PCA16}}, ease={"like": "reduced", "model": {"name": "ease"}}
    )
    assert found.experiments["ease"].reductions == {}


def test_reduced_features_that_nothing_uses_are_pruned_with_their_projection(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    noise = {"like": "shop", "control": {"image": "gaussian"}}
    found = config(PCA16, noise=noise)
    stem = features.features_path(found, "shop", "looks").removesuffix(".parquet")
    used = [stem, f"{stem}-pca16", f"{stem}-pca16-gaussian-42"]
    old = [f"{stem}-pca8", f"{stem}-pca8-constant", paths(found)["similarity.image"].replace("pca16", "pca8")]
    for name in (*used, *old):
        path = Path(name).with_suffix(".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".safetensors").write_bytes(b"")
    entries = {str(entry.path): entry.files for entry in unused(found, used_by(found))}
    assert sorted(entries) == sorted(str(Path(name).with_suffix(".parquet")) for name in old)
    assert Path(f"{stem}-pca8.safetensors") in entries[f"{stem}-pca8.parquet"]
