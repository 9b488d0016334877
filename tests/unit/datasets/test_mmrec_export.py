"""Export to MMRec: the folder loads as MMRec loads it, and comes back as the same interactions, split and vectors."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkout import Checkout
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.features import read_features, write_features
from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table, write_table
from cm3.datasets.mmrec.export import export, item_order
from cm3.datasets.mmrec.export_vectors import export_vectors
from cm3.datasets.registry import parse_dataset
from cm3.datasets.splits import split_ratings
from extractors.registry import parse_extractor

USER_IDS = ["Ünsal", "u\0nul", "u" * 300, 'q"uote', "tab\tid", "plain"]
ITEM_IDS = ["007", "café 手", "i" * 300, 'i"5', "7", "line\nend", "A\tB", "💥"]
SPLITS = ("train", "train", "valid", "test")


def write_tables(folder: Path, cold: tuple[int, ...] = (), ratings: bool = True) -> dict[str, Path]:
    """Write the processed tables of six users with four items each; `cold` items have no interaction."""
    warm = [item for item in range(len(ITEM_IDS)) if item not in cold]
    rows = [
        {
            "user": user,
            "item": warm[(user + step) % len(warm)],
            "split": SPLITS[step],
            "rating": 1.1 + step if ratings else None,
            "timestamp": 1_400_000_000 + 10 * user + step if ratings else None,
        }
        for user in range(len(USER_IDS))
        for step in range(4)
    ]
    kinds = {"interactions": INTERACTIONS, "items": ITEMS, "users": USERS}
    items = [dict.fromkeys(ITEMS.names) | {"item": n, "item_id": name} for n, name in enumerate(ITEM_IDS)]
    tables = {
        "interactions": rows,
        "items": items,
        "users": [{"user": n, "user_id": u} for n, u in enumerate(USER_IDS)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in kinds.items():
        write_table(folder / f"{name}.parquet", pa.Table.from_pylist(tables[name], schema=schema), schema)
    return {name: folder / f"{name}.parquet" for name in kinds}


def write_export(folder: Path, tables: dict[str, Path], modalities: tuple[str, ...] = ("text",)) -> Path:
    out = folder / "shop"
    outputs = {
        "inter": out / "shop.inter",
        "item_ids": out / "i_id_mapping.csv",
        "user_ids": out / "u_id_mapping.csv",
        "settings": folder / "shop.yaml",
        "readme": folder / "README.txt",
    }
    export("shop", modalities, tables, outputs)
    return out


def by_id(folder: Path) -> set[tuple[Any, ...]]:
    """Return (user id, item id, rating, timestamp, label) of processed tables."""
    user_ids = read_table(folder / "users.parquet", USERS).column("user_id").to_pylist()
    item_ids = read_table(folder / "items.parquet", ITEMS).column("item_id").to_pylist()
    rows = read_table(folder / "interactions.parquet", INTERACTIONS).to_pylist()
    return {(user_ids[r["user"]], item_ids[r["item"]], r["rating"], r["timestamp"], r["split"]) for r in rows}


def import_again(folder: Path, place: Path, **settings: Any) -> Any:
    """Prepare and split an exported folder as source mmrec; return its config."""
    place.mkdir()
    data = {"source": "mmrec", "folder": str(folder), **settings}
    run_prepare(place, data)
    dataset = parse_dataset("back", data, "datasets.back")
    spec = dataset.split_spec()
    assert spec["strategy"] == "published"
    split_ratings(place / "ratings.parquet", place / "interactions.parquet", spec["strategy"], spec["seed"])
    return dataset


def vectors_by_id(dataset: Any, place: Path, modality: str) -> dict[str, np.ndarray]:
    """Return the exported vectors as the precomputed extractor finds them."""
    published = dataset.published_vectors("back", modality)
    spec = {"modality": modality, "backend": "precomputed", "path": published["vectors"], "ids": published["ids"]}
    ids = read_table(place / "items.parquet", ITEMS).column("item_id").to_pylist()
    found = parse_extractor("back", spec, "extractors.back").load().encode([{"item_id": name} for name in ids])  # type: ignore[attr-defined]
    assert (found.status == "ok").all()
    return dict(zip(ids, found.embedding, strict=True))


@pytest.mark.parametrize("ratings", [True, False])
@pytest.mark.parametrize("cold", [(), (0, 3, 7)])
def test_the_export_comes_back_whatever_ids_hold(tmp_path: Path, cold: tuple[int, ...], ratings: bool) -> None:
    tables = write_tables(tmp_path / "processed", cold, ratings)
    vectors = np.random.default_rng(0).normal(size=(len(ITEM_IDS), 3)).astype(np.float32)
    write_features(tmp_path / "f.parquet", ITEM_IDS, vectors, ["ok"] * len(ITEM_IDS), {})
    folder = write_export(tmp_path / "out", tables)
    export_vectors(tmp_path / "f.parquet", tables["interactions"], folder / "text_feat.npy", tmp_path / "missing.csv")
    dataset = import_again(folder, tmp_path / "back", cold_items="keep")
    assert by_id(tmp_path / "back") == by_id(tmp_path / "processed")
    found = vectors_by_id(dataset, tmp_path / "back", "text")
    assert found.keys() == set(ITEM_IDS)
    assert all(np.array_equal(found[name], vectors[row]) for row, name in enumerate(ITEM_IDS))


@pytest.mark.parametrize(("cold", "expected"), [((), range(8)), ((0, 3, 7), [0, 3, 7, 1, 2, 4, 5, 6])])
def test_mmrec_counts_every_item(tmp_path: Path, cold: tuple[int, ...], expected: Any) -> None:
    tables = write_tables(tmp_path, cold)
    assert item_order(read_table(tables["interactions"], INTERACTIONS), len(ITEM_IDS)).tolist() == list(expected)
    rows = (write_export(tmp_path / "out", tables) / "shop.inter").read_text().splitlines()
    assert rows[0] == "userID\titemID\trating\ttimestamp\tx_label"
    # MMRec takes the largest number in the file, and one more, for the number of items.
    assert max(int(row.split("\t")[1]) for row in rows[1:]) + 1 == len(ITEM_IDS)
    assert {row.split("\t")[2] for row in rows[1:]} == {"1.1", "2.1", "3.1", "4.1"}
    assert "\r" not in "".join(rows)


def test_what_the_data_lack_is_left_out(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "out", write_tables(tmp_path, ratings=False))
    assert (folder / "shop.inter").read_text().startswith("userID\titemID\tx_label\n0\t0\t0\n")


def test_missing_vectors_get_the_mean_and_are_told(tmp_path: Path) -> None:
    tables = write_tables(tmp_path, cold=(1,))
    vectors = np.arange(16, dtype=np.float32).reshape(8, 2)
    status = ["ok", "ok", "missing", "ok", "failed", "ok", "ok", "ok"]
    write_features(tmp_path / "f.parquet", ITEM_IDS, vectors, status, {})
    out, missing = tmp_path / "out/text_feat.npy", tmp_path / "out/text_missing.csv"
    facts = export_vectors(tmp_path / "f.parquet", tables["interactions"], out, missing)
    assert facts == {"vectors": 8, "missing": 2, "dim": 2}
    found = np.load(out)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    mean = vectors[[0, 1, 3, 5, 6, 7]].mean(axis=0)
    # Item 1 has no interaction and comes first.
    assert np.array_equal(found, [vectors[1], vectors[0], mean, vectors[3], mean, *vectors[5:]])
    with missing.open(newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == [["asin", "itemID"], [ITEM_IDS[2], "2"], [ITEM_IDS[4], "4"]]
    write_features(tmp_path / "f.parquet", ITEM_IDS, vectors, ["missing"] * 8, {})
    with pytest.raises(UserError, match="no item has a vector"):
        export_vectors(tmp_path / "f.parquet", tables["interactions"], out, missing)


@pytest.mark.parametrize(
    ("modalities", "vision", "text"),
    [
        (("text", "image", "caption"), "image_feat.npy", "text_feat.npy"),
        (("text", "video"), "video_feat.npy", "text_feat.npy"),
        (("image", "caption"), "image_feat.npy", "caption_feat.npy"),
        (("video", "sound"), "video_feat.npy", "sound_feat.npy"),
        (("text",), "none", "text_feat.npy"),
    ],
)
def test_mmrecs_two_places_are_filled(tmp_path: Path, modalities: tuple[str, ...], vision: str, text: str) -> None:
    write_export(tmp_path / "out", write_tables(tmp_path), modalities)
    settings = yaml.safe_load((tmp_path / "out/shop.yaml").read_text())
    assert settings == {
        "USER_ID_FIELD": "userID",
        "ITEM_ID_FIELD": "itemID",
        "TIME_FIELD": "timestamp",
        "field_separator": "\t",
        "inter_file_name": "shop.inter",
        "inter_splitting_label": "x_label",
        "filter_out_cod_start_users": True,
        "vision_feature_file": vision,
        "text_feature_file": text,
        "user_graph_dict_file": "user_graph_dict.npy",
    }
    assert f"{modalities[-1]}_feat.npy" in (tmp_path / "out/README.txt").read_text()


@pytest.mark.integration
def test_a_user_exports_an_experiment_and_imports_it(tmp_path: Path) -> None:
    """The commands of docs/mmrec.md, with drawn vectors in place of a text model."""
    ids = [f"i{number}" for number in range(12)]
    vectors = pa.array(np.random.default_rng(0).normal(size=(11, 4)).tolist(), pa.list_(pa.float32()))
    pairs = [f"u{user},i{(user + step) % 12},{1_600_000_000 + step}" for user in range(20) for step in range(6)]
    source = {"source": "files", "interactions": {"path": "pairs.csv", "columns": {"timestamp": "timestamp"}}}
    words = {"modality": "text", "backend": "precomputed", "path": "words.parquet"}
    experiment = {"modalities": {"text": "words"}}
    checkout = Checkout(
        tmp_path / "work",
        {
            "datasets": {"shop": source},
            "extractors": {"words": words},
            "experiments": {"my-shop": experiment | {"dataset": "shop"}},
        },
    )
    (checkout.folder / "pairs.csv").write_text("user,item,timestamp\n" + "\n".join(pairs) + "\n")
    # The last item has no vector.
    pq.write_table(pa.table({"item_id": ids[:-1], "embedding": vectors}), checkout.folder / "words.parquet")
    folder = checkout.folder / "results/my-shop/mmrec/my-shop"
    target = "results/my-shop/mmrec/my-shop/my-shop.inter"
    checkout.run(target)
    assert checkout.planned(target) == {}
    assert "no modality 'image'" in checkout.run(
        "-n", str(folder.relative_to(checkout.folder) / "image_feat.npy"), check=False
    )
    assert (folder.parent / "my-shop.yaml").is_file() and "cp -r my-shop" in (folder.parent / "README.txt").read_text()
    dataset = import_again(folder, tmp_path / "back")
    assert by_id(tmp_path / "back") == by_id(checkout.folder / "processed/shop")
    found = vectors_by_id(dataset, tmp_path / "back", "text")
    made = next((checkout.folder / "processed/shop/features/text").glob("*.parquet"))
    own = read_features(made)
    assert all(np.array_equal(found[name], own.embedding[row]) for row, name in enumerate(own.item_ids) if own.ok[row])
    mean = own.embedding[own.ok].mean(axis=0)
    assert [name for row, name in enumerate(own.item_ids) if not own.ok[row]] == ["i11"]
    np.testing.assert_allclose(found["i11"], mean, rtol=1e-5)
    # The export as a dataset of its own, its vectors as published ones, through the DAG; exported again, it is the same.
    checkout.configure(
        {
            "datasets": {"back": {"source": "mmrec", "folder": "export/my-shop"}},
            "extractors": {"words": {"modality": "text", "backend": "precomputed", "format": "npy"}},
            "experiments": {"my-shop": experiment | {"dataset": "back"}},
        }
    )
    (folder.parent).rename(checkout.folder / "export")
    checkout.run(target)
    for name in ("my-shop.inter", "text_feat.npy", "i_id_mapping.csv", "u_id_mapping.csv"):
        assert (folder / name).read_bytes() == (checkout.folder / "export/my-shop" / name).read_bytes(), name
