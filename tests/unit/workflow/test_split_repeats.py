"""Studies over several random splits: their runs and keys, the tables that they read, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from study_config import checked, compared_runs, config, refused

from workflow.plan import comparison, data, runs
from workflow.plan.config import Config

RERANK = {"dataset": "shop", "model": {"name": "rerank", "of": "shop", "by": ["ease"]}}


def repeated(repeats: int, *names: str, seeds: tuple[int, ...] = (1, 2), **experiments: Any) -> Config:
    return checked({"experiments": list(names), "seeds": list(seeds), "split": {"repeats": repeats}}, **experiments)


def test_each_split_has_its_own_runs_and_the_first_is_the_datasets_own():
    once, thrice = (compared_runs(repeated(n, "shop", "ease")) for n in (1, 3))
    assert [(run["split"], run["seed"]) for run in thrice if run["experiment"] == "shop"] == [
        (split, seed) for split in (42, 43, 44) for seed in (1, 2)
    ]
    assert {run["run"] for run in once} == {run["run"] for run in thrice if run["split"] == 42}
    assert len({run["run"] for run in thrice}) == 3 * (2 + 1)  # a closed form has one run for all seeds of a split
    assert not any("split" in run for run in once)


def test_runs_read_their_split_and_the_features_of_all():
    loaded = repeated(2, "shop", seeds=(1,))
    first, second = (runs.train_inputs(loaded, "shop", run["run"]) for run in compared_runs(loaded))
    assert first["interactions"] == "processed/shop/interactions.parquet"
    assert second["interactions"] == "processed/shop/splits/43/interactions.parquet"
    assert {name for name in first if first[name] != second[name]} == {"interactions"}
    (_, run) = compared_runs(loaded)
    evaluated = runs.evaluate_inputs(loaded, "shop", run["run"])
    assert evaluated["interactions"] == second["interactions"]
    compared = comparison.compare_inputs(loaded, "compared")
    assert [compared[name] for name in ("interactions", "interactions-43")] == [
        first["interactions"],
        second["interactions"],
    ]
    expected = data.expected_settings(loaded, {"interactions-43": second["interactions"]} | first)
    assert expected["interactions-43"] == data.repeat_split(loaded, "shop", "43").made_from
    assert expected["interactions-43"] != expected["interactions"] == data.split(loaded, "shop").made_from


def test_the_first_split_is_made_as_without_repeats():
    loaded = repeated(2, "shop")
    assert data.split(loaded, "shop").identity == data.split(checked(), "shop").identity
    other = data.repeat_split(loaded, "shop", "43")
    assert other.spec == data.split(loaded, "shop").spec | {"seed": 43}


def test_a_re_ranking_combines_the_models_of_its_split():
    loaded = repeated(2, "both", seeds=(1,), both=RERANK)
    first, second = (runs.train_inputs(loaded, "both", run["run"]) for run in compared_runs(loaded))
    assert first["shop.user_embeddings"] != second["shop.user_embeddings"]
    for inputs in (first, second):
        run = Path(inputs["shop.user_embeddings"]).parent.name
        assert runs.train_inputs(loaded, "shop", run)["interactions"] == inputs["interactions"]


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("user-time", "it follows from the times of the interactions"),
        ("global-time", "it follows from the times of the interactions"),
        ("leave-one-out", "it follows from the times of the interactions"),
    ],
)
def test_a_split_that_is_not_random_is_not_repeated(strategy: str, reason: str):
    whole = config({"experiments": ["shop"], "split": {"repeats": 3}})
    whole["datasets"]["shop"]["split"] = {"strategy": strategy}
    message = f"studies.compared.split.repeats = 3: dataset shop has split.strategy {strategy}, of which there is one"
    assert message in refused(whole) and reason in refused(whole)


def test_a_published_split_is_not_repeated(tmp_path: Path):
    whole = config({"experiments": ["shop"], "split": {"repeats": 2}})
    whole["datasets"]["shop"] = {"source": "mmrec", "folder": str(tmp_path)}
    assert "has split.strategy published, of which there is one split only, because its labels" in refused(whole)


def test_labels_that_are_kept_are_not_repeated():
    whole = config({"experiments": ["shop"], "split": {"repeats": 2}})
    whole["datasets"]["shop"]["split"] = {"keep": "earlier"}
    assert "dataset shop has split.keep, so its splits would share" in refused(whole)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"model": {"name": "external", "recommendations": "x.csv"}}, "other has lists that another tool has computed"),
        ({"like": "shop", "training": {"warm_start": "old"}}, "other starts from a model (training.warm_start)"),
        ({"like": "shop", "modalities": {"reviews": "said"}}, "other reads features of reviews (said)"),
    ],
)
def test_what_depends_on_one_split_is_not_repeated(own: dict[str, Any], reason: str):
    whole = config({"experiments": ["other"], "split": {"repeats": 2}}, other={"dataset": "shop"} | own)
    whole["extractors"]["said"] = {**whole["extractors"]["words"], "modality": "reviews"}
    assert reason in refused(whole)
    if "model" in own:
        return
    # Nor is a re-ranking of it.
    whole["experiments"]["both"] = {"dataset": "shop", "model": {"name": "rerank", "of": "other", "by": ["ease"]}}
    whole["studies"]["compared"]["experiments"] = ["both"]
    assert reason in refused(whole)


def test_zero_splits_are_refused():
    assert "split.repeats" in refused(config({"experiments": ["shop"], "split": {"repeats": 0}}))
