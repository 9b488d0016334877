"""The comparison of a study, from the files of its cells to its JSON, table and sentences."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import oracles_cm3 as oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from study_runs import (  # noqa: F401
    FINE,
    MODALITIES,
    NOISE,
    POOR,
    Shop,
    changed,
    experiment_spec,
    make_study,
    one_thread,
    run,
    study,
)

from cm3.common.files import read_json, write_json
from cm3.evaluation.recommendations import publish_recommendations, read_ids


def pair_of(result, a, b, metric):
    return next(row for row in result["pairs"] if (row["a"], row["b"], row["metric"]) == (a, b, metric))


def per_user(spec, inputs, result, name, metric):
    runs = result["experiments"][name]["runs"]
    tables = [pq.read_table(inputs[f"per_user.{name}.{run}"]) for run in runs]
    return np.mean([table[metric].to_numpy() for table in tables], axis=0)


def test_means_and_spreads_are_those_of_the_seeds_evaluations(study):
    _, spec, inputs, _, result = study
    for name, entry in result["experiments"].items():
        assert entry["n_seeds"] == 3 and entry["seeds"] == [1, 2, 3]
        for metric in spec["metrics"]:
            values = [read_json(inputs[f"evaluation.{name}.{run}"])["test"][metric] for run in entry["runs"]]
            found = entry["metrics"][metric]
            assert found["values"] == pytest.approx(values, abs=1e-12)
            assert found["mean"] == pytest.approx(np.mean(values), abs=1e-12)
            assert found["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_a_pair_is_recomputed_from_per_user_tables(study):
    _, spec, inputs, _, result = study
    a, b = (per_user(spec, inputs, result, name, "ndcg@10") for name in ("cm3", "bm3"))
    row = pair_of(result, "cm3", "bm3", "ndcg@10")
    assert row["difference"] == pytest.approx((a - b).mean(), abs=1e-12)
    assert row["p"] == pytest.approx(stats.wilcoxon(np.round(a - b, 12), zero_method="pratt").pvalue, rel=1e-9)
    assert (row["users_a"], row["users_b"]) == ((np.round(a - b, 12) > 0).sum(), (np.round(a - b, 12) < 0).sum())
    assert row["users_a"] + row["users_b"] + row["users_equal"] == len(a)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(a), len(a), dtype=np.int32) for _ in range(1000)]
    low, high = np.quantile([(a[i] - b[i]).mean() for i in drawn], [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-12)
    own_low, own_high = np.quantile([a[i].mean() for i in drawn], [0.025, 0.975])
    own = result["experiments"]["cm3"]["metrics"]["ndcg@10"]
    assert (own["low"], own["high"]) == pytest.approx((own_low, own_high), abs=1e-12)


def test_the_correction_is_over_everything_that_is_tested(study):
    *_, result = study
    assert len(result["pairs"]) == result["settings"]["tests"] == 10 * 3
    p = np.array([row["p"] for row in result["pairs"]])
    for row in result["pairs"]:
        # Holm by its definition: the largest of (m - j + 1) p_(j) over the p-values up to this one.
        below = np.sort(p[p <= row["p"]])
        assert row["p_holm"] == pytest.approx(min(1, (below * (len(p) - np.arange(len(below)))).max()), abs=1e-15)
        away = row["low"] > 0 or row["high"] < 0
        assert row["significant"] == (row["p_holm"] < 0.05 and away)
        assert row["better"] == (None if not row["significant"] else "a" if row["difference"] > 0 else "b")


def test_a_planted_difference_is_found_and_marked(study):
    *_, result = study
    for metric in ("recall@10", "ndcg@10"):
        assert pair_of(result, "cm3", "noise", metric)["better"] == "a"
        assert result["best"][metric] == {
            "experiment": "cm3",
            "next": result["best"][metric]["next"],
            "marked": True,
            "reason": "cm3 is significantly better than every other experiment",
        }
        assert [n for n, e in result["experiments"].items() if e["metrics"][metric]["best"]] == ["cm3"]


def test_the_grid_point_is_chosen_by_validation_though_another_tests_better(tmp_path):
    shop = Shop(tmp_path)
    spec, inputs = make_study(shop, {"cm3": {"spec": experiment_spec("cm3"), "grid": {0.1: POOR, 0.5: FINE}}})
    # Validation says the poor point by its mean, though its first seed is the worst of all.
    scores = {(0.1, 1): 0.1, (0.1, 2): 0.9, (0.1, 3): 0.9, (0.5, 1): 0.6, (0.5, 2): 0.6, (0.5, 3): 0.6}
    for cell in spec["cells"]:
        path = inputs[f"train.cm3.{cell['run']}"]
        write_json(path, read_json(path) | {"best_valid": scores[cell["point"]["model.gamma"], cell["seed"]]})
    result = run(spec, inputs, tmp_path)
    entry = result["experiments"]["cm3"]
    assert entry["point"] == {"model.gamma": 0.1}
    assert entry["valid"]["values"] == [0.1, 0.9, 0.9]
    better = [read_json(inputs[f"evaluation.cm3.{c['run']}"])["test"]["recall@10"] for c in spec["cells"][3:]]
    assert np.mean(better) > entry["metrics"]["recall@10"]["mean"] + 0.1
    assert result["best"]["recall@10"]["marked"] is False


def test_points_that_were_not_chosen_show_no_test_score(study):
    _, _, inputs, folder, result = study
    entry = result["experiments"]["cm3"]
    assert [point["selected"] for point in entry["grid"]] == [False, True, False]
    for point in entry["grid"]:
        assert set(point) == {"point", "selected", "valid", "seeds", "runs", "commands"}
    others = [cell for cell in result["cells"] if not cell["selected"]]
    assert len(others) == 6 and all(cell["metrics"] is None and cell["valid"] > 0 for cell in others)
    # The scores are in neither file, in no place.
    text = (folder / "comparison.json").read_text() + (folder / "comparison.csv").read_text()
    for cell in others:
        test = read_json(inputs[f"evaluation.cm3.{cell['run']}"])["test"]
        assert test["ndcg@10"] and repr(test["ndcg@10"]) not in text


def test_equal_validation_takes_the_first_point(tmp_path):
    shop = Shop(tmp_path)
    plan = {"spec": experiment_spec("cm3"), "grid": {0.7: POOR, 0.5: FINE}, "record": {"best_valid": 0.25}}
    spec, inputs = make_study(shop, {"cm3": plan}, seeds=(1, 2))
    assert run(spec, inputs, tmp_path)["experiments"]["cm3"]["point"] == {"model.gamma": 0.7}


def test_every_cell_has_its_keys_and_its_command(study):
    _, spec, _, folder, result = study
    assert len(result["cells"]) == len(spec["cells"])
    for cell, given in zip(
        sorted(result["cells"], key=lambda c: (c["run"], c["seed"])),
        sorted(spec["cells"], key=lambda c: (c["run"], c["seed"])),
        strict=True,
    ):
        assert {key: cell[key] for key in given} == given
        assert cell["folder"] == f"results/{given['experiment']}/runs/{given['run']}"
    for row in csv.DictReader((folder / "comparison.csv").open()):
        entry = result["experiments"][row["experiment"]]
        targets = [f"results/{row['experiment']}/runs/{run}/evaluation.json" for run in row["runs"].split()]
        assert row["runs"].split() == list(dict.fromkeys(entry["runs"]))
        assert row["command"] == " ".join(["snakemake --cores 8", *targets])


def test_the_table_is_the_json(study):
    _, spec, _, folder, result = study
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    places = [(row["experiment"], row["slice"], row["metric"]) for row in rows]
    assert len(set(places)) == len(places)
    by_place = dict(zip(places, rows, strict=True))
    for name, entry in result["experiments"].items():
        for metric in spec["metrics"]:
            row, numbers = by_place[name, "all", metric], entry["metrics"][metric]
            assert (float(row["mean"]), float(row["sd"])) == (numbers["mean"], numbers["sd"])
            assert (float(row["low"]), float(row["high"])) == (numbers["low"], numbers["high"])
        for metric in ("coverage@10", "popularity@5", "novelty@10"):
            assert float(by_place[name, "all", metric]["mean"]) == entry["beyond"][metric]["mean"]
    row = by_place["bm3", "all", "ndcg@10"]
    assert (
        row["against"] == "cm3" and float(row["difference"]) == -pair_of(result, "cm3", "bm3", "ndcg@10")["difference"]
    )
    assert read_json(folder / "comparison.json") == json.loads(json.dumps(result)), "nothing is rounded on the way"


def test_slices_and_lists_are_those_of_plain_loops(study):
    shop, _, inputs, _, result = study
    train, test = ([set() for _ in range(shop.n_users)] for _ in range(2))
    for user, item, split in shop.pairs:
        if split in (0, 2):
            (train if split == 0 else test)[user].add(item)
    counts = [sum(item in bought for bought in train) for item in range(shop.n_items)]
    cold = {item for item, count in enumerate(counts) if not count}
    slices = {one["name"]: one for one in result["slices"]}
    wanting = [user for user in range(shop.n_users) if test[user] & cold]
    assert slices["cold"]["users"] == len(wanting) and slices["cold"]["items"] == len(cold)
    for name in ("cm3", "mostpop"):
        entry = result["experiments"][name]
        for number, key in enumerate(entry["runs"]):
            table = pq.read_table(inputs[f"recommendations.{name}.{key}"]).to_pylist()
            lists = [[] for _ in range(shop.n_users)]
            for row in sorted(table, key=lambda row: row["rank"]):
                lists[row["user"]].append(row["item"])
            plain = [oracle.metrics_of(lists[u], test[u] & cold, 10)["recall"] for u in wanting]
            assert slices["cold"]["metrics"][name]["recall@10"]["values"][number] == pytest.approx(np.mean(plain))
            shown = {item for found in lists for item in found[:10]}
            assert entry["beyond"]["coverage@10"]["values"][number] == len(shown) / shop.n_items
            popularity = np.mean([np.mean([counts[item] for item in found[:10]]) for found in lists])
            assert entry["beyond"]["popularity@10"]["values"][number] == pytest.approx(popularity)


def test_models_without_embeddings_have_no_geometry_and_closed_forms_no_spread(study):
    *_, result = study
    ease, mostpop = result["experiments"]["ease"], result["experiments"]["mostpop"]
    assert ease["geometry"] is None and mostpop["geometry"]["alignment"]["mean"] > 0
    assert ease["deterministic"] and not result["experiments"]["cm3"]["deterministic"]
    assert ease["metrics"]["recall@10"]["sd"] == 0
    counts = result["counts"]
    assert (counts["cells"], counts["runs"]) == (9 + 3 + 3 + 3 + 3, 9 + 3 + 3 + 1 + 1), "a closed form has one run"
    assert ease["cost"]["cells"] == 1 and result["experiments"]["cm3"]["cost"]["cells"] == 9
    assert result["experiments"]["cm3"]["cost"]["all_cells_seconds"] == 9 * 12.5
    assert result["experiments"]["cm3"]["cost"]["train_seconds"] == {"mean": 12.5, "sd": 0.0, "values": [12.5] * 3}


def test_a_reference_limits_the_family_to_what_is_read(study, tmp_path):
    _, spec, inputs, *_ = study
    result = run(spec, inputs, tmp_path, reference="bm3", metrics=["ndcg@10"])
    pairs = {(row["a"], row["b"]) for row in result["pairs"]}
    assert pairs == {(name, "bm3") for name in ("cm3", "noise", "ease", "mostpop")} | {("cm3", "noise")}
    assert result["settings"]["tests"] == 5
    assert result["best"]["ndcg@10"]["marked"] is False and "was not tested" in result["best"]["ndcg@10"]["reason"]


def test_identical_models_are_never_told_apart(tmp_path):
    shop = Shop(tmp_path)
    plan = {"quality": 0.6, "noise": 7}
    twins = {name: {"spec": experiment_spec("cm3", modalities=MODALITIES), **plan} for name in ("one", "two")}
    twins["two"]["spec"] |= {"control": NOISE, "control_of": "one"}
    result = run(*make_study(shop, twins), tmp_path)
    for row in result["pairs"]:
        assert (row["difference"], row["low"], row["high"], row["p"], row["p_holm"]) == (0, 0, 0, 1, 1)
        assert row["better"] is None and row["seeds"]["exceeds"] is False
    assert not any(best["marked"] for best in result["best"].values())
    (said,) = result["words"]
    assert said["verdict"] == "none" and said["text"].startswith("one gains nothing measurable from its content: ")


def test_models_that_differ_by_chance_alone_are_seldom_told_apart(tmp_path):
    # Twelve equally good models: with 66 true nulls in one family, Holm lets at most 5 % of studies err.
    shop = Shop(tmp_path, n_users=80)
    equals = {f"m{n}": {"spec": experiment_spec("bm3"), "quality": 0.6} for n in range(12)}
    spec, inputs = make_study(shop, equals, seeds=(1, 2))
    result = run(spec, inputs, tmp_path, metrics=["ndcg@10"])
    assert len(result["pairs"]) == 66
    assert not any(row["significant"] for row in result["pairs"])
    assert sum(row["p"] < 0.05 for row in result["pairs"]) < 30, "uncorrected, some of them would be"


def test_the_order_of_rows_on_disk_changes_nothing(study, tmp_path):
    _, spec, inputs, _, result = study
    turned = changed(inputs, "per_user", lambda table: table.take(pa.array(np.arange(len(table))[::-1])))
    shuffled = np.random.default_rng(0).permutation(
        len(pq.read_table(next(p for n, p in inputs.items() if n.startswith("recommendations.bm3"))))
    )
    turned |= {
        name: path
        for name, path in changed(inputs, "recommendations", lambda t: t.take(pa.array(shuffled))).items()
        if name.startswith("recommendations")
    }
    assert run(spec, turned, tmp_path) == result


def test_lists_of_earlier_releases_have_ids_and_give_the_same_result(study, tmp_path):
    _, spec, inputs, _, result = study
    ids = read_ids(inputs["users"], inputs["items"])
    earlier = {name: tmp_path / name for name in inputs if name.startswith("recommendations.")}
    for name, path in earlier.items():
        publish_recommendations(inputs[name], path, ids)
    assert run(spec, inputs | earlier, tmp_path) == result


def test_files_are_read_by_parts_and_whole_alike(study, tmp_path, monkeypatch):
    _, spec, inputs, _, result = study
    monkeypatch.setattr("cm3.evaluation.recommendations._GROUPS", 3)
    monkeypatch.setattr("cm3.common.embeddings._BATCH_ROWS", 11)
    monkeypatch.setattr("cm3.reports.analysis.slices._BLOCK_PAIRS", 7)
    monkeypatch.setattr("cm3.reports.analysis.slices._BLOCK_USERS", 5)
    monkeypatch.setattr("cm3.reports.analysis.beyond_accuracy._BLOCK_USERS", 13)
    parts = {}
    for name in (name for name in inputs if name.split(".")[0] in ("recommendations", "user_embeddings")):
        parts[name] = tmp_path / f"{name}.parquet"
        pq.write_table(pq.read_table(inputs[name]), parts[name], row_group_size=64)
    assert run(spec, inputs | parts, tmp_path) == result


def test_the_stage_runs_from_the_command_line(study, tmp_path):
    _, spec, inputs, *_ = study
    command = [
        sys.executable,
        "-m",
        "cm3.reports.analysis.compare",
        "--spec",
        json.dumps(spec | {"metrics": ["ndcg@10"]}),
    ]
    for name, path in inputs.items():
        command += ["--input", f"{name}={path}"]
    for name in ("comparison.json", "comparison.csv", "compare.stage.json"):
        kind = {"comparison.json": "comparison", "comparison.csv": "table"}.get(name, "record")
        command += ["--output", f"{kind}={tmp_path / name}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "compare.stage.json")["tests"] == 10
    assert read_json(tmp_path / "comparison.json")["metrics"] == ["ndcg@10"]
